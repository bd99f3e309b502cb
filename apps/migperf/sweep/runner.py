"""Runs one trial on any backend: rung by rung, so that whoever watches (ASHA, the search) can stop it after a first look.

Live trials lease a slice for a process of their own (process.py); on ``sim`` a trial is drawn from published measurements or
the prediction model on a virtual clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from actors.mig.backends import BackendError, Lease, SliceBackend
from actors.mig.backends.cpu import CpuBackend
from actors.mig.prediction import Measurement, PredictionError, predict
from apps.migperf.sweep.energy import PowerMeter, attribute
from apps.migperf.sweep.loops import VirtualTime, Window, closed_loop, open_loop
from apps.migperf.sweep.process import TrialEnded, TrialProcess, WorkerSettings
from apps.migperf.sweep.trial import FULL, TrialPoint, TrialResult

Rungs = Sequence[float]
"""Seconds of measuring of each rung, one after another."""


@dataclass(frozen=True)
class Meter:
    """How the board's energy is watched: the GPU's number and what it draws idle; None for a machine without one."""

    gpu: int = 0
    idle_w: float = 0.0


def run_trial(
    point: TrialPoint,
    backend: SliceBackend,
    rungs: Rungs,
    settings: WorkerSettings = WorkerSettings(),
    meter: Meter | None = None,
) -> Iterator[TrialResult]:
    """Results after each rung, each of all rungs so far; all but the last have the status ``stopped``. The slice must exist
    already (the layout is cut).

    Out of memory and failures are results, not exceptions; the process has ended when the generator has (or is closed).
    """
    with contextlib.ExitStack() as stack:
        try:
            processes = [
                stack.enter_context(TrialProcess(point, lease, settings)) for lease in _leases(point, backend, stack)
            ]
            for process in processes:
                process.wait_ready()
        except TrialEnded as ended:
            yield _ended(point, ended)
            return
        except BackendError as error:
            yield TrialResult(point, "failed", note=str(error))
            return
        yield from _rungs(point, backend, processes, rungs, meter)


def _rungs(
    point: TrialPoint, backend: SliceBackend, processes: Sequence[TrialProcess], rungs: Rungs, meter: Meter | None
) -> Iterator[TrialResult]:
    start_s = max(process.start_s for process in processes)
    seen: Window | None = None
    for number, seconds in enumerate(rungs):
        power = PowerMeter(meter.gpu).start() if meter is not None else None
        try:
            for other, process in enumerate(processes):
                process.begin(seconds, seed=100 * number + other)
            windows = [process.finish() for process in processes]
        except TrialEnded as ended:
            yield dataclasses.replace(_ended(point, ended), start_s=start_s, seconds=sum(rungs[: number + 1]))
            return
        finally:
            samples = power.stop() if power is not None else []
        seen = windows[0] if seen is None else seen.joined(windows[0])
        result = summary(point, seen, start_s, "ok" if number == len(rungs) - 1 else "stopped")
        result = dataclasses.replace(result, memory_mib=processes[0].memory_mib, note=_note(point, power))
        if samples and meter is not None:
            result = _with_energy(result, samples, meter, backend, len(processes))
        if isinstance(backend, CpuBackend) and point.profile != FULL:
            held = next((one.uuid for one in backend.slices() if one.profile == point.profile), None)
            with contextlib.suppress(BackendError):
                result = dataclasses.replace(result, achieved_share=backend.use(held or "").achieved_share)
        yield result


def summary(point: TrialPoint, window: Window, start_s: float, status: str) -> TrialResult:
    """The numbers of a window."""
    samples = 1 if not window.latencies_ms else point.batch
    if not window.latencies_ms:
        return TrialResult(
            point, "failed", window.seconds, start_s, dropped=window.dropped, note="No batch was finished."
        )
    return TrialResult(
        point=point,
        status=status,  # type: ignore[arg-type]
        seconds=window.seconds,
        start_s=start_s,
        steps=len(window.latencies_ms),
        latency_mean_ms=window.mean_ms,
        latency_std_ms=window.std_ms,
        latency_p50_ms=window.percentile_ms(0.5),
        latency_p95_ms=window.percentile_ms(0.95),
        latency_p99_ms=window.percentile_ms(0.99),
        throughput_per_s=samples * window.batches_per_s(),
        dropped=window.dropped,
    )


class SimulatedTrials:
    """Trials of the backend ``sim``: rows of published measurements where they have the point, else predictions from them."""

    def __init__(self, rows: Sequence[Measurement]):
        self._rows = list(rows)

    def run(self, point: TrialPoint, rungs: Rungs, seed: int = 0) -> Iterator[TrialResult]:
        """As ``run_trial``, without a process: batches take their latency on a virtual clock."""
        try:
            mean_ms, std_ms, memory_mib, oom = self._look_up(point)
        except PredictionError as error:
            yield TrialResult(point, "failed", note=str(error))
            return
        if oom:
            yield TrialResult(
                point, "oom", memory_mib=memory_mib, note="The published run (or the memory model) says so."
            )
            return
        rng, seen = random.Random(f"{point.key}/{seed}"), None
        sigma = math.sqrt(math.log1p(min(std_ms / mean_ms, 1.0) ** 2))
        for number, seconds in enumerate(rungs):
            clock = VirtualTime()

            def step(clock: VirtualTime = clock) -> None:
                clock.sleep(mean_ms / 1e3 * rng.lognormvariate(-sigma * sigma / 2, sigma))

            if point.rate_per_s is None:
                window = closed_loop(step, seconds, clock)
            else:
                window = open_loop(step, point.rate_per_s, seconds, clock, seed + number)
            seen = window if seen is None else seen.joined(window)
            result = summary(point, seen, 0.0, "ok" if number == len(rungs) - 1 else "stopped")
            yield dataclasses.replace(result, memory_mib=memory_mib, note="simulated")

    def _look_up(self, point: TrialPoint) -> tuple[float, float, float | None, bool]:
        """(mean, standard deviation, memory, out of memory)."""
        asked = Measurement(
            point.device, point.mode, point.workload, point.profile, point.batch, point.sequence, latency_ms=None
        )
        for row in self._rows:
            if (row.group, row.profile, row.batch, row.sequence, row.processes) == (
                asked.group, asked.profile, asked.batch, asked.sequence, 1,
            ):  # fmt: skip
                if row.oom:
                    return 0.0, 0.0, row.fb_mib, True
                if row.latency_ms:
                    return row.latency_ms, row.latency_std_ms or 0.05 * row.latency_ms, row.fb_mib, False
        alike = [row for row in self._rows if row.group == asked.group]
        if not alike:
            raise PredictionError(
                f"Nothing is known of {point.workload!r} ({point.mode}) on {point.device}: give a table that has it "
                "(sweep.measurements=FILE.csv)."
            )
        answer = predict([*alike, asked])[-1]
        return answer.latency_ms, (answer.high_ms - answer.low_ms) / 3.29, None, answer.oom


# ---- the inside


def _leases(
    point: TrialPoint, backend: SliceBackend, stack: contextlib.ExitStack
) -> list[Callable[[int], Mapping[str, str]]]:
    """One for each process of the trial: one slice, or (co-run) every slice of the profile."""
    if point.profile == FULL:
        return [lambda pid: {}]
    there = [found for found in backend.slices() if found.profile == point.profile]
    if not there:
        raise BackendError(f"The layout has no slice {point.profile}: cut it before the trial.")

    def lease_of(uuid: str) -> Callable[[int], Mapping[str, str]]:
        def lease(pid: int) -> Mapping[str, str]:
            held: Lease = backend.lease(uuid, pid)
            stack.callback(backend.release, held)
            return dict(held.environment)

        return lease

    return [lease_of(found.uuid) for found in (there if point.corun else there[:1])]


def _ended(point: TrialPoint, ended: TrialEnded) -> TrialResult:
    return TrialResult(point, ended.status, note=str(ended))  # type: ignore[arg-type]


def _note(point: TrialPoint, power: PowerMeter | None) -> str:
    corun = "co-run: power, clocks and PCIe are shared" if point.corun else ""
    if point.corun and point.backend == "green":
        corun += "; the GPU switches between processes in time unless MPS runs"
    return "; ".join(filter(None, [corun, power.why if power is not None else ""]))


def _with_energy(
    result: TrialResult, samples: list, meter: Meter, backend: SliceBackend, count: int
) -> TrialResult:  # fmt: skip
    share = 1.0
    if result.point.profile != FULL:
        share = next(p.compute_share for p in backend.profiles() if p.name == result.point.profile)
    names = [str(number) for number in range(count)]
    # Where activity cannot be read by slice (before Hopper), co-running slices are alike: the board's is each one's.
    seen = [
        dataclasses.replace(sample, activity=dict.fromkeys(names, sample.activity.get("", 1.0))) for sample in samples
    ]
    parts = attribute(seen, dict.fromkeys(names, min(share, 1 / count)), meter.idle_w)
    if parts is None or parts.seconds <= 0:
        return result
    activity = sum(sample.activity["0"] for sample in seen) / len(seen)
    energy = parts.slices_j["0"]
    return dataclasses.replace(
        result,
        energy_j=energy,
        power_w=energy / parts.seconds,
        energy_error=parts.error,
        sm_activity=activity,
    )
