"""The verb ``report``: trials of one or several sweeps as pictures, HTML and CSV, published measurements beside them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from actors.mig.backends import BackendError, Lease, open_backend
from actors.mig.prediction import Measurement
from apps.migperf.compatibility import PROBES, Compatibility, probe
from apps.migperf.measurements import read_table
from apps.migperf.pictures import add_studies
from apps.migperf.sweep.store import Store
from apps.migperf.sweep.trial import TrialResult
from apps.program.errors import UserError
from apps.program.report import Report, print_table
from apps.program.run_folder import RunFolder, new_run_folder


def report(
    folders: Annotated[list[Path] | None, typer.Argument(help="Run folders of sweeps; default: the latest.")] = None,
    published: Annotated[
        list[Path] | None, typer.Option(help="CSV of published measurements (columns as for predict), drawn beside.")
    ] = None,
    probe_frameworks: Annotated[
        bool, typer.Option("--probe", help="Also try which frameworks run inside a slice (or without one).")
    ] = False,
    backend: Annotated[
        str, typer.Option(help="For --probe: the backend whose smallest slice is used; 'none'.")
    ] = "none",
    gpu: Annotated[str, typer.Option(help="For --probe: the GPU.")] = "0",
) -> None:
    """Draw sweeps: latency, throughput, tails, energy, out-of-memory; HTML, PNG and CSV in a new run folder."""
    given = folders or [Path(os.environ.get("SEXTANT_RUNS") or "runs") / "migperf" / "latest"]
    results: list[TrialResult] = []
    for folder in given:
        found = Store(folder).load()
        if not found and not probe_frameworks and not published:
            raise UserError(f"There are no trials in {folder}: a sweep's run folder has trials.jsonl.")
        results += found
    rows = [row for path in published or () for row in read_table(path).rows]
    frameworks = probe_all(backend, gpu) if probe_frameworks else []
    folder = new_run_folder("migperf")
    Store(folder.path).write_csv(results)
    if frameworks:
        print_table(
            ["framework", "outcome", "detail"], [[one.framework, one.outcome, one.detail] for one in frameworks]
        )
    print(sweep_report(results, folder, rows, frameworks))


def sweep_report(
    results: Sequence[TrialResult],
    folder: RunFolder,
    published: Sequence[Measurement] = (),
    frameworks: Sequence[Compatibility] = (),
) -> str:
    """Writes report.html with its pictures; returns where it is."""
    backends = sorted({result.point.backend for result in results})
    warning = " The backend cpu is an analogue: its numbers say nothing of MIG." if "cpu" in backends else ""
    page = Report(
        "MIGPerf: slices measured", f"{len(results)} trials on {', '.join(backends) or 'no backend'}.{warning}"
    )
    add_studies(page, results, published)
    page.add_table(
        "All trials",
        ["backend", "profile", "workload", "mode", "batch", "seq", "status", "mean ms", "P50", "P95", "P99", "samples/s",
         "MiB", "J", "energy error", "note"],
        [[r.point.backend, r.point.profile + (" co-run" if r.point.corun else ""), r.point.workload, r.point.mode,
          r.point.batch, r.point.sequence, r.status, r.latency_mean_ms, r.latency_p50_ms, r.latency_p95_ms,
          r.latency_p99_ms, r.throughput_per_s, r.memory_mib, r.energy_j, r.energy_error, r.note] for r in results],
        "status: oom ran out of memory; stopped had a first look alone, because it could not be the best.",
    )  # fmt: skip
    if frameworks:
        page.add_table(
            "Frameworks in a slice",
            ["framework", "outcome", "detail"],
            [[one.framework, one.outcome, one.detail] for one in frameworks],
        )
    return page.write(folder)


def probe_all(backend: str, gpu: str) -> list[Compatibility]:
    """Every framework in the smallest slice of a backend (``none``: without a slice).

    Raises:
        UserError: the backend's sentence.
    """
    if backend == "none":
        return [probe(framework, os.environ) for framework in PROBES]
    try:
        with open_backend(backend, gpu=gpu) as opened:
            there = opened.slices()
            made = None if there else opened.create(opened.profiles()[0].name)
            try:
                lease: Lease = opened.lease((made or there[0]).uuid)
                found = [probe(framework, lease.over()) for framework in PROBES]
                opened.release(lease)
            finally:
                if made is not None:
                    opened.destroy(made.uuid)
            return found
    except BackendError as error:
        raise UserError(str(error)) from error
