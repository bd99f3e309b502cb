"""The verb ``sweep``: measures workloads on slices, as few trials and re-partitions as it takes, resumable."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Annotated

import typer

from actors.mig.backends import BackendError, SliceBackend, make_backend
from actors.mig.prediction import Measurement, Slice
from apps.migperf.config import MigperfConfig, SweepConfig
from apps.migperf.measurements import read_table
from apps.migperf.sweep.layouts import Layout, group, repartitions
from apps.migperf.sweep.process import WorkerSettings
from apps.migperf.sweep.runner import Meter
from apps.migperf.sweep.search import Candidate, Costs, Search
from apps.migperf.sweep.store import Store
from apps.migperf.sweep.trial import FULL, TrialPoint
from apps.migperf.workloads.shapes import SHAPES, shape
from apps.program.errors import UserError
from apps.program.report import print_table
from apps.program.run_folder import RunFolder, new_run_folder


def sweep(
    config: MigperfConfig,
    resume: Annotated[Path | None, typer.Option(help="The run folder of a sweep that was cut off.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the trials, by layout.")] = False,
) -> None:
    """Measure workloads on slices of a device: latency, throughput, memory, energy; the best configuration of each question."""
    wanted = config.sweep
    try:
        backend = make_backend(wanted.backend, gpu=wanted.gpu, memory_mib=wanted.memory_mib)
        try:
            candidates = make_candidates(wanted, backend)
            label = backend.label
        finally:
            backend.close()
    except BackendError as error:
        raise UserError(str(error)) from error
    layouts = list(dict.fromkeys(candidate.layout for candidate in candidates))
    print(
        f"{len(candidates)} trials on {wanted.backend} ({label}); {repartitions(layouts)} re-partitions cover them all."
    )
    if dry_run:
        for candidate in candidates:
            print(f"  {'+'.join(candidate.layout) or 'no slices':30} {candidate.point.key}")
        return
    if resume is not None and not resume.is_dir():
        raise UserError(f"There is no run folder {resume} to resume.")
    folder = RunFolder(resume) if resume is not None else new_run_folder("migperf", config=config)
    run_and_report(config, candidates, folder)


def run_and_report(config: MigperfConfig, candidates: list[Candidate], folder: RunFolder) -> None:
    """The sweep itself; writes the table, result.json and the report into the folder.

    Raises:
        UserError: the backend's sentence.
    """
    from actors.cluster.session import ray_session
    from apps.migperf.report_command import sweep_report
    from apps.migperf.sweep.tune import SweepPlan, run_sweep

    wanted = config.sweep
    search = Search(
        candidates,
        Costs(window_s=wanted.window_s),
        guided=wanted.search == "guided",
        regret=wanted.regret,
        latency_limit_ms=wanted.latency_limit_ms,
    )
    plan = SweepPlan(
        functools.partial(make_backend, wanted.backend, gpu=wanted.gpu, memory_mib=wanted.memory_mib),
        (0.2 * wanted.window_s, 0.8 * wanted.window_s),
        WorkerSettings(wanted.dtype, cuda=wanted.backend in ("mig", "green", "mps")),
        Meter(int(wanted.gpu)) if wanted.backend in ("mig", "green", "mps") else None,
        tuple(simulated_rows(wanted)) if wanted.backend == "sim" else (),
        wanted.scheduler,
    )
    try:
        with ray_session(config.ray):
            outcome = run_sweep(search, plan, Store(folder.path), say=lambda text: print(f"  {text}"))
    except BackendError as error:
        raise UserError(f"{error} What was measured stands in {folder}: sweep --resume {folder} goes on.") from error
    best = []
    for question in search.questions:
        found = search.best(question)
        if found is not None:
            candidate, value = found
            result = search.done[candidate.point.key]
            best.append([candidate.point.workload, candidate.point.mode, candidate.point.sequence, candidate.point.profile,
                         candidate.most, candidate.point.batch, value, result.latency_p99_ms])  # fmt: skip
    columns = ["workload", "mode", "sequence", "profile", "slices", "batch", "device samples/s", "P99 (ms)"]
    print_table(columns, best, f"The best configuration ({wanted.backend})")
    oom = sum(result.status == "oom" for result in outcome.results)
    failed = [result for result in outcome.results if result.status == "failed"]
    print(
        f"{len(outcome.results)} of {len(candidates)} trials run ({oom} out of memory, {len(failed)} failed), "
        f"{len(outcome.pruned)} pruned by the predictor, {outcome.repartitions} re-partitions in {outcome.repartition_s:.1f} s."
    )
    for result in failed[:5]:
        print(f"  failed: {result.point.key}: {result.note}")
    folder.write_result(
        {
            "trials": len(outcome.results),
            "candidates": len(candidates),
            "oom": oom,
            "failed": len(failed),
            "pruned": dict(outcome.pruned),
            "repartitions": outcome.repartitions,
            "repartition_s": outcome.repartition_s,
            "best": [dict(zip(columns, row, strict=True)) for row in best],
        }
    )
    print(sweep_report(outcome.results, folder))


def make_candidates(wanted: SweepConfig, backend: SliceBackend) -> list[Candidate]:
    """The grid, each point with its slice and layout, in the order of layouts.

    Raises:
        UserError, BackendError: an unknown workload or profile, nothing to do, or no device.
    """
    profiles = {profile.name: profile for profile in backend.profiles()}
    names = list(wanted.profiles) or [FULL, *profiles]
    unknown = [name for name in names if name != FULL and name not in profiles]
    if unknown:
        raise UserError(
            f"The backend {wanted.backend} has no profile {unknown[0]!r}: it has {FULL}, {', '.join(profiles)}."
        )
    if wanted.backend == "mig" and FULL in wanted.profiles:
        # With MIG on a process without a lease sees one MIG device: that would be no baseline.
        raise UserError(
            "The baseline without MIG needs MIG mode off: turn it off (python -m apps.migperf controller disable) and measure it "
            "with sweep.backend=green sweep.profiles=[full]."
        )
    if wanted.backend in ("sim", "mig"):
        names = [name for name in names if name != FULL or wanted.profiles]
    points = []
    for workload, mode, batch, sequence, rate, corun, profile in itertools.product(
        wanted.workloads, wanted.modes, wanted.batches, wanted.sequences or (None,), wanted.rates_per_s, wanted.corun, names
    ):  # fmt: skip
        if wanted.backend != "sim" and not shape(workload, wanted.scale).has_sequence:
            sequence = None
        if wanted.backend == "sim" and workload in SHAPES and not SHAPES[workload].has_sequence:
            sequence = None
        points.append(
            TrialPoint(
                wanted.backend, backend.device, profile, workload, mode, batch, sequence, rate, wanted.scale, corun
            )
        )
    points = list(dict.fromkeys(points))
    if not points:
        raise UserError("The sweep has no trials: give workloads, modes and batches.")
    found = []
    for layout, members in group(points, backend):
        found += [_candidate(point, backend, layout) for point in members]
    return found


def simulated_rows(wanted: SweepConfig) -> list[Measurement]:
    """The published measurements that ``sim`` draws from.

    Raises:
        UserError: none were given, or they cannot be read.
    """
    if wanted.measurements is None:
        raise UserError(
            "The backend sim draws from measurements: give sweep.measurements=FILE.csv (columns as for predict)."
        )
    return [row for row in read_table(Path(wanted.measurements)).rows if row.latency_ms is not None or row.oom]


def _candidate(point: TrialPoint, backend: SliceBackend, layout: Layout) -> Candidate:
    if point.profile == FULL:
        return Candidate(point, Slice(point.device, FULL, 0, 1.0, 1.0, 1e9), 1, layout)
    profile = next(known for known in backend.profiles() if known.name == point.profile)
    part = Slice(
        point.device,
        profile.name,
        profile.sm_count or 0,
        profile.compute_share,
        # Where bandwidth is not partitioned the predictor still needs a number: time on a share of a CPU scales as one.
        profile.compute_share if backend.name == "cpu" else profile.bandwidth_share,
        profile.memory_mib or 1e9,
    )
    return Candidate(point, part, profile.most, layout)
