"""The verb ``share``: what neighbours cost. The same workload alone, in slices side by side, and side by side without slices
(time slicing by the system); P99 and throughput against alone, alternating round by round."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from actors.mig.backends import BackendError, Lease, SliceBackend, open_backend
from apps.migperf.config import MigperfConfig, ShareConfig
from apps.migperf.pictures import sharing
from apps.migperf.sweep.loops import Window
from apps.migperf.sweep.process import TrialEnded, TrialProcess, WorkerSettings
from apps.migperf.sweep.trial import FULL, TrialPoint
from apps.program.errors import UserError
from apps.program.report import Report, print_table
from apps.program.run_folder import new_run_folder


@dataclass(frozen=True)
class Sharing:
    """One way to share: medians over the rounds of the ratios to the same process alone in the same way."""

    way: str
    p99_alone_ms: float
    p99_ratio: float
    throughput_ratio: float
    """Of all processes together to one alone."""


def share(config: MigperfConfig) -> None:
    """Measure the interference between workloads on one device: in slices, and sharing it without slices."""
    wanted = config.share
    try:
        with open_backend(wanted.backend, gpu=wanted.gpu) as backend:
            profile = choose_profile(wanted, backend)
            before = tuple(found.profile for found in backend.slices())
            backend.repartition([profile] * wanted.processes)
            try:
                sliced = measure(wanted, backend, profile)
            finally:
                backend.repartition(before)
            plain = measure(wanted, backend, FULL)
            label = backend.label
    except BackendError as error:
        raise UserError(str(error)) from error
    rows = [sliced, plain]
    table = [[one.way, one.p99_alone_ms, one.p99_ratio, one.throughput_ratio] for one in rows]
    columns = ["sharing", "P99 alone (ms)", "P99 shared / alone", "samples/s together / alone"]
    title = f"{wanted.processes} x {wanted.workload} ({label})"
    print_table(columns, table, title)
    folder = new_run_folder("migperf", config=config)
    folder.write_result({"label": label, "rows": rows})
    page = Report("MIGPerf: sharing a device", title)
    page.add_table("Interference", columns, table)
    page.add_figure("Sharing", sharing([(one.way, one.p99_ratio, one.throughput_ratio) for one in rows]))
    print(page.write(folder))


def choose_profile(wanted: ShareConfig, backend: SliceBackend) -> str:
    """The configured profile, or the largest of which enough fit.

    Raises:
        UserError: none fits often enough.
    """
    names = [profile.name for profile in backend.profiles()]
    if wanted.profile is not None and wanted.profile not in names:
        raise UserError(f"The backend {wanted.backend} has no profile {wanted.profile!r}: it has {', '.join(names)}.")
    asked = names[::-1] if wanted.profile is None else [wanted.profile]
    for name in asked:
        if backend.fits([name] * wanted.processes):
            return name
    raise UserError(f"{wanted.processes} slices of {asked[-1]} do not fit on {backend.device}.")


def measure(wanted: ShareConfig, backend: SliceBackend, profile: str) -> Sharing:
    """Alone and together in turn, with the same processes.

    Raises:
        UserError: a process ran out of memory or failed.
    """
    point = TrialPoint(backend.name, backend.device, profile, wanted.workload, wanted.mode, wanted.batch,
                       wanted.sequence, wanted.rate_per_s, wanted.scale, corun=True)  # fmt: skip
    settings = WorkerSettings(wanted.dtype, cuda=backend.name != "cpu", threads=1)
    there = [found.uuid for found in backend.slices() if found.profile == profile]
    tails, speeds, alone_ms = [], [], []
    with contextlib.ExitStack() as stack:

        def lease_of(number: int) -> Callable[[int], Mapping[str, str]]:
            def lease(pid: int) -> Mapping[str, str]:
                if profile == FULL:
                    return {}
                held: Lease = backend.lease(there[number], pid)
                stack.callback(backend.release, held)
                return dict(held.environment)

            return lease

        try:
            processes = [
                stack.enter_context(TrialProcess(point, lease_of(number), settings))
                for number in range(wanted.processes)
            ]
            for process in processes:
                process.wait_ready()
            for number in range(wanted.rounds):
                alone = processes[0].measure(wanted.window_s, number)
                for other, process in enumerate(processes):
                    process.begin(wanted.window_s, 1000 * (other > 0) + number + other)
                together = [process.finish() for process in processes]
                alone_ms.append(alone.percentile_ms(0.99))
                tails.append(together[0].percentile_ms(0.99) / alone.percentile_ms(0.99))
                speeds.append(sum(map(Window.batches_per_s, together)) / alone.batches_per_s())
        except TrialEnded as ended:
            raise UserError(f"{point.key}: {ended}") from ended
    way = "time slicing (no slices)" if profile == FULL else f"{backend.name} {profile}"
    return Sharing(way, *(statistics.median(values) for values in (alone_ms, tails, speeds)))
