"""Balanced sparsity on the CPU: products with k:B weights against torch's dense ones and against CSR, in one run.

    python -m benchmarks.balanced_kernels_cpu [--quick] [--size 4096] --out DIR

Ratios are rival / ours, so above 1 is faster. Products at batch 1 are cold: both sides go round copies of their weight that are
together several times the last-level cache. The byte ceiling is the best rate at which this run saw one core read. No Ray.
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.balanced.arms import Cold, copy_bandwidth, csr_arms, last_level_cache_bytes, stream_bandwidth
from benchmarks.balanced.picture import speedups
from benchmarks.engine_arms import read_bandwidth
from benchmarks.harness import Benchmark, Samples, Target, alternate, print_rows
from kernels.balanced import BalancedWeight, balanced_linear, calibrate, dispatch, pack, reference, save
from kernels.balanced.linear import sparse
from kernels.balanced.selection import cpp
from kernels.balanced.spec import ValueType
from kernels.build import INSTALL_HINT

TARGETS = [
    Target("spmv_vs_dense_50", 1.4, 1.6, meaning="dense fp32 / ours, batch 1, one thread, cold cache"),
    Target("spmv_vs_dense_75", 2.6, 3.1),
    Target("spmv_vs_dense_875", 5, 6.2),
    Target("spmv_vs_dense_906", 6, 7.5),
    Target(
        "fraction_of_byte_ceiling", 0.8, 0.95, meaning="bytes / time / best read rate of a core; the worst of the four"
    ),
    Target("spmv_bf16_vs_dense_50", 2, 2.5, meaning="bf16 values against fp32 dense"),
    Target("spmv_vs_torch_csr", 2.5, 3, meaning="the worst of 50, 75, 87.5 and 90.6 %"),
    Target("spmv_vs_scipy_csr", 2.5, 3),
    Target("two_thread_scaling", 1.4, 1.8, meaning="one thread / two threads, the worst of 50, 75 and 90.6 %"),
    Target("spmm_vs_dense_90_batch4", 2, 4, meaning="2:20, one thread, dense fp32 / ours"),
    Target("spmm_vs_dense_90_batch16", 1.5, 3),
    Target("spmm_vs_dense_90_batch64", 1, 2),
    Target(
        "dispatcher_worst_vs_dense", 0.95, 0.99, meaning="dense / balanced_linear over shapes, batches and sparsities"
    ),
    Target(
        "checkpoint_bytes_vs_ideal",
        1.05,
        1.02,
        better="lower",
        meaning="file / kept values and smallest index, the worst",
    ),
]
PATTERNS = {"50": (16, 32), "75": (8, 32), "875": (4, 32), "906": (3, 32)}
"""k:B of the figures, by the name of the sparsity."""


@dataclass(frozen=True)
class Setting:
    """What all parts share."""

    bench: Benchmark
    size: int
    rounds: int

    def weight(self, k: int, block: int, value_type: ValueType = "fp32") -> tuple[torch.Tensor, BalancedWeight]:
        """A random dense weight and the packed one."""
        dense = torch.randn(self.size, self.size, generator=torch.Generator().manual_seed(k + block))
        return dense, pack(dense, k, block, value_type=value_type)

    def check(self, weight: BalancedWeight, batch: int = 2) -> float:
        """Largest error of the kernel against float64 over the largest result; stops the run where it computes something else."""
        x = torch.randn(batch, weight.columns)
        expected = reference.linear(x, weight)
        error = float((sparse(x, weight) - expected).abs().max() / expected.abs().max())
        if not error < 1e-4:
            raise ArithmeticError(f"{weight.spec} is wrong by {error:.3g}: no time of it means anything")
        return error


def report(setting: Setting, what: str, samples: Samples, rival: str, ours: str, **labels: object) -> float:
    """A row: both medians and the ratio, which is returned."""
    ratio = samples.ratio(rival, ours)
    setting.bench.row(
        what=what,
        **labels,
        rival=rival,
        rival_ms=round(samples.median(rival) * 1e3, 4),
        ours_ms=round(samples.median(ours) * 1e3, 4),
        ratio=round(ratio.median, 3),
        low=round(ratio.low, 3),
        high=round(ratio.high, 3),
        rounds=ratio.count,
    )
    return ratio.median


def spmv(setting: Setting, cold_bytes: int) -> None:
    """Batch 1: against dense, the byte ceiling, bf16 and int8 values, CSR, two threads."""
    bench = setting.bench
    torch.set_num_threads(1)
    x = torch.randn(1, setting.size)
    dense_cold = Cold([torch.randn(setting.size, setting.size)], torch.clone, cold_bytes, lambda w: w.nbytes)
    arms: dict[str, Callable[[], object]] = {"dense": lambda: F.linear(x, dense_cold.next())}
    bench.say("streams of one core: reading, copying")
    streams = {
        "read": stream_bandwidth(256 << 20),
        "reduction": read_bandwidth(256 << 20),
        "copy": copy_bandwidth(256 << 20),
    }
    read = alternate(streams, 5, returns_value=True)
    weights: dict[str, Cold[BalancedWeight]] = {}
    errors: dict[str, float] = {}
    cases: list[tuple[str, int, int, ValueType]] = [(name, k, b, "fp32") for name, (k, b) in PATTERNS.items()]
    cases += [
        ("50 bf16", 16, 32, "bf16"),
        ("75 bf16", 8, 32, "bf16"),
        ("50 int8", 16, 32, "int8"),
        ("875 4-bit", 2, 16, "fp32"),
    ]
    for name, k, block, value_type in cases:
        packed = setting.weight(k, block, value_type)[1]
        errors[name] = setting.check(packed)
        weights[name] = Cold([packed], BalancedWeight.clone, cold_bytes, lambda w: w.nbytes)
        arms[name] = lambda cold=weights[name]: sparse(x, cold.next())  # type: ignore[misc]
    bench.say(f"{setting.size} x {setting.size}, batch 1, cold: dense and {len(weights)} balanced weights")
    samples = alternate(arms, setting.rounds)
    dense_bytes = dense_cold.items[0].nbytes
    # What a core can read: the best of pure reading, of torch's reduction, of a copy (its reads) and of the dense product.
    rates = {
        "sixteen streams": read.median("read") * 1e9,
        "reduction": read.median("reduction") * 1e9,
        "copy (reads)": read.median("copy") * 1e9 / 2,
        "dense product": dense_bytes / samples.median("dense"),
    }
    ceiling = max(rates.values())
    for name, rate in rates.items():
        bench.row(what="read rate of one core", rival=name, gb_per_s=round(rate / 1e9, 2))
    fractions = []
    for name, k, block, value_type in cases:
        nbytes = weights[name].items[0].nbytes
        fraction = nbytes / samples.median(name) / ceiling
        ratio = report(
            setting, "spmv", samples, "dense", name, pattern=f"{k}:{block}", values=value_type,
            index=weights[name].items[0].spec.index_kind, byte_ratio=round(dense_bytes / nbytes, 3),
            fraction_of_ceiling=round(fraction, 3), error=errors[name],
        )  # fmt: skip
        if name in PATTERNS:
            bench.figure(f"spmv_vs_dense_{name}", ratio)
            fractions.append(fraction)
        elif name == "50 bf16":
            bench.figure("spmv_bf16_vs_dense_50", ratio)
    bench.figure("fraction_of_byte_ceiling", min(fractions))
    bench.picture(speedups(bench.rows))
    against_csr(setting, x, weights, cold_bytes)
    two_threads(setting, x, {name: weights[name] for name in ("50", "75", "906")})


def against_csr(setting: Setting, x: torch.Tensor, weights: dict[str, Cold[BalancedWeight]], cold_bytes: int) -> None:
    """torch's and scipy's CSR of the same entries, with 32-bit indices, as cold as ours."""
    worst = {"torch CSR": math.inf, "scipy CSR": math.inf}
    for name in PATTERNS:
        setting.bench.say(f"CSR, {name}")
        cold = weights[name]
        arms = csr_arms(cold.items[0].unpack(), x, cold_bytes)
        arms["ours"] = lambda cold=cold: sparse(x, cold.next())  # type: ignore[misc]
        samples = alternate(arms, max(5, setting.rounds // 4))
        for rival in worst:
            ratio = report(setting, "spmv", samples, rival, "ours", pattern=name)
            worst[rival] = min(worst[rival], ratio)
    setting.bench.figure("spmv_vs_torch_csr", worst["torch CSR"])
    setting.bench.figure("spmv_vs_scipy_csr", worst["scipy CSR"])


def two_threads(setting: Setting, x: torch.Tensor, weights: dict[str, Cold[BalancedWeight]]) -> None:
    """The same product on one and on two threads of torch's pool, cold."""
    setting.bench.say("two threads")

    def with_threads(cold: Cold[BalancedWeight], threads: int) -> Callable[[], object]:
        def call() -> object:
            return sparse(x, cold.next())

        def measured() -> float:
            torch.set_num_threads(threads)
            for _ in range(3):
                sparse(x, cold.next())  # wakes the pool, and lets the system spread it
            return timed(call)

        return measured

    scaling = []
    for name, cold in weights.items():
        arms = {"one thread": with_threads(cold, 1), "two threads": with_threads(cold, 2)}
        samples = alternate(arms, setting.rounds, returns_value=True)
        scaling.append(report(setting, "two threads", samples, "one thread", "two threads", pattern=name))
    torch.set_num_threads(1)
    setting.bench.figure("two_thread_scaling", min(scaling))


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    return alternate({"call": call}, 1, warmup=0).values["call"][0]


def spmm(setting: Setting) -> None:
    """Batches of x at 90 % (and at 75 %), one thread."""
    torch.set_num_threads(1)
    for name, k, block in (("90", 2, 20), ("75", 8, 32)):
        dense, packed = setting.weight(k, block)
        setting.check(packed, 5)
        for batch in (4, 16, 64):
            setting.bench.say(f"batch {batch}, {name} %")
            x = torch.randn(batch, setting.size)
            arms: dict[str, Callable[[], object]] = {
                "dense": lambda x=x, w=dense: F.linear(x, w),  # type: ignore[misc]
                "ours": lambda x=x, w=packed: sparse(x, w),  # type: ignore[misc]
            }
            samples = alternate(arms, max(5, setting.rounds // 3))
            ratio = report(setting, "spmm", samples, "dense", "ours", pattern=f"{k}:{block}", batch=batch)
            if name == "90":
                setting.bench.figure(f"spmm_vs_dense_90_batch{batch}", ratio)


def grid(quick: bool) -> Iterator[tuple[int, int, int, int, int]]:
    """(rows, columns, k, block, batch) of the dispatcher's examination."""
    shapes = (
        [(512, 512), (2048, 1024)] if quick else [(512, 512), (768, 3072), (2048, 1024), (1000, 1500), (4096, 4096)]
    )
    patterns = [(16, 32), (3, 32), (48, 64)] if quick else [(2, 4), (16, 32), (8, 32), (3, 32), (48, 64), (32, 128)]
    batches = [1, 8, 64] if quick else [1, 3, 8, 16, 48, 128]
    for (rows, columns), (k, block), batch in itertools.product(shapes, patterns, batches):
        yield rows, columns, k, block, batch


def dispatcher(setting: Setting) -> None:
    """``balanced_linear`` against ``F.linear`` wherever it may be called, with the table of this machine."""
    bench = setting.bench
    torch.set_num_threads(1)
    path = dispatch.table_path()
    if not path.exists():
        bench.say("this machine has no table of the dispatcher yet: measuring one (python -m kernels.balanced)")
        dispatch.save(calibrate.calibrate(quick=bench.quick), path)
        dispatch.reset()
    bench.row(what="dispatcher", rival=dispatch.table().source)
    worst = math.inf
    generator = torch.Generator().manual_seed(1)
    for rows, columns, k, block, batch in grid(bench.quick):
        dense = torch.randn(rows, columns, generator=generator)
        packed = pack(dense, k, block)
        x = torch.randn(batch, columns, generator=generator)
        arms: dict[str, Callable[[], object]] = {
            "dense": lambda x=x, w=dense: F.linear(x, w),  # type: ignore[misc]
            "ours": lambda x=x, w=packed: balanced_linear(x, w),  # type: ignore[misc]
        }
        with torch.inference_mode():
            # Some milliseconds a measurement, or else the first call, which finds the other arm's weight in the cache, is all of
            # it; and as many rounds that begin with one arm as with the other.
            calls = max(1, min(200, round(2e-3 / min(timed(arms["dense"]) for _ in range(5)))))
            samples = alternate(arms, 10, calls=calls)
            if samples.ratio("dense", "ours").median < 1:  # is it, or was the machine busy?
                samples = alternate(arms, 40, calls=calls)
        arm = dispatch.choose(packed, batch, x.dtype)
        labels = {"shape": f"{rows}x{columns}", "pattern": f"{k}:{block}", "batch": batch, "arm": arm}
        worst = min(worst, report(setting, "dispatcher", samples, "dense", "ours", **labels))
    bench.figure("dispatcher_worst_vs_dense", worst)


def checkpoint(setting: Setting) -> None:
    """Bytes of a file of one weight against its values and smallest index without any padding."""
    worst = 0.0
    dense = torch.randn(1024, 1024)
    cases: list[tuple[int, int, ValueType]] = [
        (2, 4, "bf16"),
        (16, 32, "fp32"),
        (8, 32, "bf16"),
        (3, 32, "int8"),
        (2, 16, "fp16"),
    ]
    for k, block, value_type in [*cases, (25, 256, "bf16"), (2, 20, "fp32")]:
        weight = pack(dense, k, block, value_type=value_type)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weight.safetensors"
            save(path, {"weight": weight})
            ratio = path.stat().st_size / weight.spec.ideal_bytes
        worst = max(worst, ratio)
        index = weight.spec.with_smallest_index("rows").index_kind
        setting.bench.row(
            what="checkpoint", pattern=f"{k}:{block}", values=value_type, index=index, ratio=round(ratio, 4)
        )
    setting.bench.figure("checkpoint_bytes_vs_ideal", worst)


def main(arguments: list[str] | None = None) -> int:
    """Runs all and prints the table."""
    options = {"--size": {"type": int, "default": 4096, "help": "rows and columns of the weights (a multiple of 32)"}}
    bench = Benchmark(
        "balanced_kernels_cpu", "Balanced products against dense ones and CSR.", TARGETS, arguments, options
    )
    if not cpp():
        print(f"error: there is no C++ kernel to measure; {INSTALL_HINT}", file=sys.stderr)
        return 2
    setting = Setting(bench, bench.arguments.size, 15 if bench.quick else 60)
    with torch.inference_mode():
        spmv(setting, (2 if bench.quick else 3) * last_level_cache_bytes())
        spmm(setting)
    dispatcher(setting)
    checkpoint(setting)
    for what in ("spmv", "two threads", "spmm", "dispatcher"):
        print_rows(what, [row for row in bench.rows if row["what"] == what])
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
