"""MIGPerf on a GPU without MIG permission: green-context slices, in one process, without Ray. Says so where there is no GPU.

    green_predict_error     latency on two sizes known (the whole GPU and the smallest slice), the others predicted: median error
    green_p99_ratio         P99 beside a neighbour / alone, each on its own SMs (green contexts)
    timeslice_p99_ratio     the same without slices, the neighbour in a process of its own: the GPU switches between them in time
    shared_p99_ratio        the same without slices, both in one process: two streams share all SMs
    energy_sum_error        |sum of the slices' parts - board's counter| / counter, over a co-run

Only SMs are isolated: L2 and memory bandwidth are shared, so small slices of bandwidth-bound kernels look faster than MIG's.
"""

from __future__ import annotations

import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from actors.mig.backends.errors import BackendError
from actors.mig.backends.green import GreenBackend
from actors.mig.backends.green_driver import GreenDriver, GreenPartition
from actors.mig.prediction import Measurement, Slice
from apps.migperf.sweep.energy import PowerMeter, Sample, attribute
from apps.migperf.sweep.process import TrialProcess, WorkerSettings
from apps.migperf.sweep.trial import FULL, TrialPoint, percentile
from benchmarks.harness import Benchmark, Target, print_rows

TARGETS = [
    Target(
        "green_predict_error",
        7,
        7,
        "lower",
        "% error of sizes that were not measured, from the whole GPU and the smallest",
    ),
    Target("energy_sum_error", 0.01, 0.01, "lower", "parts against the board's counter"),
]
WORKLOADS = (("bert_base", 64), ("resnet50", None))
BATCHES = (1, 8, 32)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 without a GPU too: then there is nothing to report, and a line says why."""
    bench = Benchmark("migperf_gpu", "MIGPerf: green-context slices of a GPU.", TARGETS, arguments)
    reason = no_gpu()
    if reason is not None:
        bench.say(f"no GPU row: {reason}")
        print(f"migperf_gpu: nothing measured. {reason}")
        return 0
    backend = GreenBackend(0)
    errors = [error for name, sequence in WORKLOADS for error in predict(bench, backend, name, sequence)]
    bench.figure("green_predict_error", 100 * statistics.median(errors))
    corun(bench, backend)
    print_rows("green contexts", bench.rows)
    return bench.finish()


def no_gpu() -> str | None:
    """Why nothing can be measured here; None where it can."""
    try:
        GreenDriver(0)
    except BackendError as error:
        return str(error)
    import torch

    if not torch.cuda.is_available():
        return "This torch has no CUDA: install torch's CUDA build."
    return None


def predict(bench: Benchmark, backend: GreenBackend, name: str, sequence: int | None) -> list[float]:
    """Relative errors of the slices that were not shown to the predictor."""
    from actors.mig.prediction.predictor import predict_group
    from apps.migperf.sweep.search import make_group_of_slices

    profiles = backend.profiles()
    total = profiles[-1].sm_count or 1
    rows, parts, truth = [], [], []
    for profile, batch in itertools.product(profiles, BATCHES):
        sms = profile.sm_count or total
        latency, actual = latency_ms(name, sequence, batch, sms, 10 if bench.quick else 50)
        # Bandwidth is not partitioned: every slice has the whole of it.
        parts.append(Slice(backend.device, profile.name, actual, actual / total, 1.0, 1e9))
        known = profile in (profiles[0], profiles[-1])
        rows.append(Measurement(backend.device, "infer", name, profile.name, batch, sequence,
                                latency_ms=latency if known else None))  # fmt: skip
        truth.append(latency)
        bench.row(part="solo", workload=name, sms=actual, asked_sms=sms, batch=batch, latency_ms=latency)
    found = predict_group(make_group_of_slices(rows, parts))
    errors = [
        abs(one.latency_ms - ms) / ms for one, row, ms in zip(found, rows, truth, strict=True) if row.latency_ms is None
    ]
    bench.say(f"{name}: predicted with a median error of {100 * statistics.median(errors):.1f} %")
    return errors


def latency_ms(name: str, sequence: int | None, batch: int, sms: int, steps: int) -> tuple[float, int]:
    """(median latency, SMs that the slice really had)."""
    with GreenPartition(GreenDriver(0), [sms]) as partition:
        step = stepper(name, sequence, batch, partition.streams[0])
        times = [step() for _ in range(steps + 3)][3:]
        return statistics.median(times), partition.sm_counts[0]


def stepper(name: str, sequence: int | None, batch: int, stream: int | None) -> Callable[[], float]:
    """A call that runs one batch on a stream (None: a new plain one) and returns its milliseconds."""
    import torch

    from apps.migperf.workloads.build import Workload
    from apps.migperf.workloads.shapes import shape

    on: Any = torch.cuda.Stream() if stream is None else torch.cuda.ExternalStream(stream)
    with torch.cuda.stream(on):
        workload = Workload(shape(name), "infer", batch, sequence, "cuda", torch.bfloat16)
    torch.cuda.synchronize()

    def step() -> float:
        began = time.perf_counter()
        with torch.cuda.stream(on), torch.inference_mode():
            workload.model(workload._input)
        on.synchronize()  # the stream alone: a device-wide wait would wait for the neighbour too
        return (time.perf_counter() - began) * 1e3

    return step


def corun(bench: Benchmark, backend: GreenBackend) -> None:
    """P99 of a small-batch server alone and beside a large-batch neighbour: on SMs of its own, and sharing all."""
    total = backend.profiles()[-1].sm_count or 0
    half = backend.profiles()[-2].sm_count or total // 2
    seconds = 2.0 if bench.quick else 10.0
    meter = PowerMeter(0)
    idle_w = meter.idle_w()
    with GreenPartition(GreenDriver(0), [half, total - half]) as partition:
        server = stepper("bert_base", 64, 1, partition.streams[0])
        neighbour = stepper("bert_base", 64, 64, partition.streams[1])
        power = PowerMeter(0).start()
        green = tail_ratio(server, neighbour, seconds)
        samples = power.stop()
    shared = tail_ratio(stepper("bert_base", 64, 1, None), stepper("bert_base", 64, 64, None), seconds)
    bench.figure("green_p99_ratio", green)
    bench.figure("shared_p99_ratio", shared)
    bench.figure("timeslice_p99_ratio", timesliced_ratio(stepper("bert_base", 64, 1, None), seconds))
    seen = [Sample(s.at_s, s.power_w, {"server": s.activity.get("", 1.0), "neighbour": s.activity.get("", 1.0)}, s.counter_j)
            for s in samples]  # fmt: skip
    parts = attribute(seen, {"server": half / total, "neighbour": 1 - half / total}, idle_w)
    if parts is not None and parts.error is not None:
        bench.figure("energy_sum_error", parts.error)
        bench.row(
            part="energy", board_j=parts.board_j, **{f"{name}_j": value for name, value in parts.slices_j.items()}
        )
    else:
        bench.say(f"no energy figure: {power.why or 'the board has no energy counter'}")


def timesliced_ratio(server: Callable[[], float], seconds: float) -> float:
    """P99 of the server beside a neighbour in another process over P99 alone, median of three rounds."""
    point = TrialPoint("green", "gpu", FULL, "bert_base", "infer", 64, 64)
    ratios = []
    with TrialProcess(point, lambda pid: {}, WorkerSettings("bfloat16", cuda=True)) as neighbour:
        neighbour.wait_ready()
        for _ in range(3):
            alone = _tail(server, seconds)
            neighbour.begin(seconds)
            beside = _tail(server, seconds)
            neighbour.finish()
            ratios.append(beside / alone if alone else math.nan)
    return statistics.median(ratios)


def tail_ratio(server: Callable[[], float], neighbour: Callable[[], float], seconds: float) -> float:
    """P99 of the server beside the neighbour over P99 alone, median of three rounds."""
    ratios = []
    for _ in range(3):
        alone = _tail(server, seconds)
        ending = threading.Event()
        failures: list[BaseException] = []

        def work(ending: threading.Event = ending, failures: list[BaseException] = failures) -> None:
            try:
                while not ending.is_set():
                    neighbour()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            beside = _tail(server, seconds)
        finally:
            ending.set()
            thread.join()
        if failures:
            raise failures[0]
        ratios.append(beside / alone if alone else math.nan)
    return statistics.median(ratios)


def _tail(step: Callable[[], float], seconds: float) -> float:
    until, times = time.monotonic() + seconds, []
    while time.monotonic() < until:
        times.append(step())
    return percentile(sorted(times), 0.99)


if __name__ == "__main__":
    raise SystemExit(main())
