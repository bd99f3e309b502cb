"""What recording costs: a record, a step of DDP on the c4 backend against gloo, and the ring's all-reduce against gloo's.

``python -m benchmarks.c4_overhead [--quick]``: processes of one thread each, no Ray. Both arms run in the same processes in
alternation; beside every overhead stands gloo against itself, which is the noise of the machine in that run.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.c4.recorder.layout import Communicator
from actors.c4.recorder.records import ElementType, OpFlag, OpType
from actors.c4.recorder.ring import RingWriter, new_ring
from benchmarks.c4.overhead_ranks import run_ranks, time_all_reduces, time_ddp
from benchmarks.harness import Benchmark, Samples, Target, print_rows

TARGETS = [
    Target("record_us", 2.0, 1.0, "lower", "stamps of one operation: entered, begun, ended"),
    Target("overhead_fraction", 0.03, 0.005, "lower", "DDP step of 100 ms or more, 2 ranks: c4 / gloo - 1"),
    Target("ring_allreduce_vs_gloo_16MiB", 1.2, 1.0, "lower", "time of c4's all-reduce / gloo's, 4 ranks"),
]
KIB, MIB = 1 << 10, 1 << 20
STEP_S = 0.11


def main() -> int:
    """Runs everything; returns the exit code."""
    options: dict[str, dict[str, Any]] = {"--only": {"choices": ("record", "ring", "ddp"), "help": "one part alone"}}
    bench = Benchmark("c4_overhead", __doc__ or "", TARGETS, options=options)
    only = bench.arguments.only
    if only in (None, "record"):
        records(bench)
    if only in (None, "ring"):
        rings(bench)
    if only in (None, "ddp"):
        steps(bench)
    for part in dict.fromkeys(row["part"] for row in bench.rows):
        print_rows(part, [{k: v for k, v in row.items() if k != "part"} for row in bench.rows if row["part"] == part])
    return bench.finish()


# ---- a record


def records(bench: Benchmark) -> None:
    """Time of the stamps alone, in a ring in shared memory, as the median of many batches."""
    batches = 40 if bench.quick else 200
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place, prefix="c4record") as folder:
        ring = new_ring(Path(folder), "bench", 0, 0, 2)
        group = ring.add_communicator(Communicator("0", "dp", (0, 1)))
        plain = _per_call(lambda count: _stamp_operations(ring, group, count), batches)
        ringed = _per_call(lambda count: _stamp_ring_operations(ring, group, count), batches)
    bench.figure("record_us", plain * 1e6)
    bench.figure("record_ring_us", ringed * 1e6)
    bench.row(part="a record", what="operation on gloo or NCCL: entered and begun, ended", microseconds=plain * 1e6)
    bench.row(
        part="a record", what="ring operation: also begun by itself, and both connections", microseconds=ringed * 1e6
    )


def _stamp_operations(ring: RingWriter, group: int, count: int) -> None:
    enter, end, op_type, element_type, flags = (
        ring.enter,
        ring.end,
        OpType.ALL_REDUCE,
        ElementType.FLOAT32,
        OpFlag.ASYNC,
    )
    for sequence in range(count):
        end(enter(group, sequence, op_type, element_type, 4096, -1, flags, True))


def _stamp_ring_operations(ring: RingWriter, group: int, count: int) -> None:
    for sequence in range(count):
        op_id = ring.enter(group, sequence, OpType.ALL_REDUCE, ElementType.FLOAT32, 4096, -1, OpFlag.RING)
        ring.open_edges(op_id, sequence, group, 1, 0, 1)
        ring.start(op_id)
        ring.end(op_id)


def _per_call(stamp: Any, batches: int, count: int = 2000) -> float:
    took = []
    for number in range(batches + 1):
        began = time.perf_counter()
        stamp(count)
        if number:
            took.append((time.perf_counter() - began) / count)
    return statistics.median(took)


# ---- the ring


def rings(bench: Benchmark) -> None:
    """All-reduce of float32 over 2 and 4 ranks; a round's time is that of the slowest rank."""
    plans = [(4, (16 * MIB,), 12 if bench.quick else 60), (4, (KIB, 64 * KIB, MIB), 12 if bench.quick else 60)]
    plans += [(2, (KIB, 64 * KIB, MIB, 16 * MIB), 8 if bench.quick else 40)]
    arms = ("gloo", "c4", "c4_rotated") if bench.quick else ("gloo", "c4", "c4_rotated", "c4_python")
    for size, payloads, rounds in plans:
        bench.say(f"all-reduce over {size} ranks: {', '.join(_size(payload) for payload in payloads)}")
        by_rank = run_ranks(size, time_all_reduces, arms, payloads, rounds)
        for payload in payloads:
            samples = _slowest([one[payload] for one in by_rank])
            ratios = {arm: samples.ratio(arm, "gloo") for arm in arms if arm != "gloo"}
            if (size, payload) == (4, 16 * MIB):
                bench.figure("ring_allreduce_vs_gloo_16MiB", ratios["c4"].median)
            bench.row(
                part="all-reduce, seconds over gloo's", ranks=size, payload=_size(payload),
                gloo_ms=samples.median("gloo") * 1e3, gloo_spread=samples.spread("gloo"), c4_ms=samples.median("c4") * 1e3,
                **{arm: str(ratio) for arm, ratio in ratios.items()},
            )  # fmt: skip


def _slowest(by_rank: Sequence[dict[str, tuple[float, ...]]]) -> Samples:
    return Samples({arm: tuple(map(max, zip(*(one[arm] for one in by_rank), strict=True))) for arm in by_rank[0]})


def _size(payload: int) -> str:
    return f"{payload // MIB} MiB" if payload >= MIB else f"{payload // KIB} KiB"


# ---- a step


def steps(bench: Benchmark) -> None:
    """DDP over gloo, over gloo again and over c4, in blocks of steps in alternation."""
    plans = [(2, 15 if bench.quick else 150)]
    if not bench.quick:
        plans.append((4, 60))
    for size, rounds in plans:
        arms = ("gloo", "gloo_again", "c4")
        bench.say(f"DDP over {size} ranks: {rounds} rounds of {len(arms)} blocks")
        (samples_of, batch, gradient_bytes), *_ = run_ranks(size, time_ddp, arms, rounds, 4, STEP_S)
        samples = Samples(samples_of)
        overhead, noise = samples.ratio("c4", "gloo"), samples.ratio("gloo_again", "gloo")
        if size == 2:
            bench.figure("overhead_fraction", overhead.median - 1)
            bench.figure("overhead_noise", noise.median - 1)
            bench.figure("overhead_step_ms", samples.median("gloo") * 1e3)
        bench.row(
            part="a DDP step", ranks=size, rounds=rounds, batch=batch, gradients_mib=gradient_bytes / MIB,
            gloo_ms=samples.median("gloo") * 1e3, c4_over_gloo=str(overhead), gloo_over_gloo=str(noise),
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
