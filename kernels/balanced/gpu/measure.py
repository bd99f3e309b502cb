"""Measures the GPU dispatcher's table: every fitting arm at each batch with a cold L2, in a CUDA graph and eagerly.

Also what benchmarks time with: ``Cold``, ``captured``, ``eager``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from kernels.balanced.format import BalancedWeight, pack
from kernels.balanced.gpu import arms, table
from kernels.balanced.gpu.arms import GpuArm
from kernels.balanced.spec import BalancedFormatError, ValueType

PATTERNS = (
    *((8, 16, 1), (4, 16, 1), (2, 16, 1), (16, 32, 1), (8, 32, 1), (4, 32, 1), (2, 32, 1)),
    *((32, 64, 1), (16, 64, 1), (6, 64, 1), (64, 128, 1), (32, 128, 1), (12, 128, 1)),
    *((2, 4, 1), (16, 32, 32), (8, 32, 32), (4, 32, 32), (16, 32, 64), (8, 32, 64), (4, 32, 64)),
)
"""(k, block, rows that share the choice)."""
TYPES: tuple[tuple[ValueType, torch.dtype], ...] = (
    ("fp16", torch.float16), ("bf16", torch.bfloat16), ("int8", torch.bfloat16), ("int8", torch.float16), ("fp32", torch.float32),
)  # fmt: skip
SIZES = (1024, 4096, 8192)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
MARGIN = 1.05
"""A sparse arm must be faster by so much to be taken: dense is the safe choice."""
MOST_COPIES = 256
"""Of a weight that is measured: small ones need not all be out of the L2."""


@dataclass(frozen=True)
class Progress:
    """One regime that was measured."""

    number: int
    of: int
    regime: table.GpuRegime
    arms: tuple[tuple[int, GpuArm], ...]


class Cold:
    """Copies of one weight, enough of them that each has left the L2 when its turn comes, as in a decode through many layers."""

    def __init__(self, weight: BalancedWeight):
        self._weights = [weight]
        self._cache = l2_bytes(weight.device)

    def runs(self, arm: GpuArm, x: torch.Tensor, use_compiled: bool = True) -> list[Callable[[], torch.Tensor]]:
        """The product by ``arm`` with one copy after the other."""
        first = self._weights[0]
        nbytes = first.rows * first.columns * x.itemsize if arm == "dense" else first.nbytes
        count = min(MOST_COPIES, max(2, -(-2 * self._cache // nbytes)))
        while len(self._weights) < count:
            self._weights.append(first.clone())

        def run(weight: BalancedWeight) -> Callable[[], torch.Tensor]:
            return lambda: arms.product(arm, x, weight, None, use_compiled)

        return [run(weight) for weight in self._weights[:count]]


def captured(runs: list[Callable[[], torch.Tensor]]) -> Callable[[], float]:
    """All of ``runs`` in one CUDA graph; the returned function replays it and gives microseconds for each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and derives what is kept of a weight, outside of the capture
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()

    def replay() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e3 / len(runs)

    return replay


def eager(runs: list[Callable[[], torch.Tensor]]) -> Callable[[], float]:
    """The same as Python calls it: microseconds of each, launches included."""
    for run in runs:
        run()

    def call() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for run in runs:
            run()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) * 1e6 / len(runs)

    return call


def l2_bytes(device: torch.device) -> int:
    """Of the last cache level of a GPU, at least 64 MiB."""
    return max(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0), 64 << 20)


def regimes(quick: bool) -> Iterator[tuple[ValueType, torch.dtype, tuple[int, int, int], int]]:
    """(value type, dtype of x, pattern, size) of what is measured."""
    for value_type, x_dtype in TYPES[:1] if quick else TYPES:
        for pattern in PATTERNS:
            for size in SIZES[1:] if quick else SIZES:
                yield value_type, x_dtype, pattern, size


def measure(
    device: torch.device, quick: bool = False, progress: Callable[[Progress], None] | None = None
) -> table.GpuTable:
    """Measure and return a table; the caller saves it. Raises BalancedFormatError where there is no kernel to measure."""
    if not arms.takes(device, torch.float16):
        raise BalancedFormatError(f"there is no sparse kernel for {device} here: a CUDA GPU and Triton are needed")
    todo = list(regimes(quick))
    found: list[tuple[table.GpuRegime, tuple[tuple[int, GpuArm], ...]]] = []
    with torch.inference_mode(), torch.cuda.device(device):
        for number, (value_type, x_dtype, (k, block, vector), size) in enumerate(todo, start=1):
            dense = torch.randn(size, size, device=device)
            weight = pack(dense, k, block, value_type=value_type, vector=vector)
            cold = Cold(weight)
            for in_graph in (True, False):
                regime = table.regime_of(weight.spec, x_dtype, in_graph)
                fastest = tuple((batch, _fastest(cold, weight, x_dtype, batch, in_graph)) for batch in BATCHES)
                found.append((regime, fastest))
                if progress is not None:
                    progress(Progress(number, len(todo), regime, fastest))
    return table.GpuTable(tuple(found), f"measured on {torch.cuda.get_device_name(device)}")


def _fastest(cold: Cold, weight: BalancedWeight, x_dtype: torch.dtype, batch: int, in_graph: bool) -> GpuArm:
    x = torch.randn(batch, weight.columns, device=weight.device).to(x_dtype)
    names = arms.working(weight.spec, x_dtype, batch, weight.device)
    if batch > 256:  # a dense product of the same work is always faster
        names.remove("decompress")
    return choose(times({name: cold.runs(name, x) for name in names}, in_graph))


def times(runs: dict[GpuArm, list[Callable[[], torch.Tensor]]], in_graph: bool, rounds: int = 7) -> dict[GpuArm, float]:
    """Median microseconds of each arm, measured in turn."""
    measures = {name: (captured if in_graph else eager)(of_arm) for name, of_arm in runs.items()}
    samples = [{name: measure() for name, measure in measures.items()} for _ in range(rounds + 1)][1:]
    return {name: statistics.median(sample[name] for sample in samples) for name in runs}


def choose(microseconds: dict[GpuArm, float]) -> GpuArm:
    """The fastest arm, dense unless another beats it by the margin."""
    best = min(microseconds, key=lambda name: microseconds[name])
    return best if microseconds["dense"] / microseconds[best] >= MARGIN else "dense"
