"""Measures the dispatcher's table on this machine: for each kernel, density and size the batch from which dense is faster."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from kernels.balanced import dispatch
from kernels.balanced.format import pack
from kernels.balanced.linear import dense, sparse
from kernels.balanced.spec import BalancedFormatError, ValueType

PATTERNS = (
    *((28, 32), (24, 32), (20, 32), (16, 32), (12, 32), (8, 32), (5, 32)),  # bitmaps
    *((4, 32), (2, 32), (4, 16), (2, 16)),  # 8-bit and 4-bit entries, a tile in two registers and in one
    *((48, 64), (32, 64), (16, 64), (8, 64)),  # 8-bit entries, a tile in four registers
    *((64, 128), (32, 128), (12, 128)),  # in eight
    *((128, 256), (64, 256), (24, 256)),  # in sixteen
)
"""(k, block) of every kernel, from dense to sparse."""
SIZES = (256, 512, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MARGIN = 1.05
"""Sparse must be faster by so much to be taken: dense is the safe choice."""


@dataclass(frozen=True)
class Progress:
    """One regime that was measured."""

    number: int
    of: int
    regime: dispatch.Regime
    dense_from: int


def regimes(quick: bool) -> Iterator[tuple[ValueType, torch.dtype, int, int, int]]:
    """(value type, dtype of x, k, block, size) of what is measured."""
    types: tuple[tuple[ValueType, torch.dtype], ...] = (
        ("fp32", torch.float32),
        ("bf16", torch.float32),
        ("int8", torch.float32),
    )
    if not quick:
        types += (("fp16", torch.float32), ("bf16", torch.bfloat16))
    for value_type, x_dtype in types:
        for k, block in PATTERNS:
            for size in (512, 2048) if quick else SIZES:
                yield value_type, x_dtype, k, block, size


def calibrate(quick: bool = False, progress: Callable[[Progress], None] | None = None) -> dispatch.Table:
    """Measure and return a table; the caller saves it. Raises BalancedFormatError where there is no sparse kernel."""
    if not dispatch.sparse_available(torch.device("cpu"), torch.float32):
        raise BalancedFormatError("there is no C++ kernel here, so that dense is always taken: nothing to measure")
    todo = list(regimes(quick))
    found: list[tuple[dispatch.Regime, int]] = []
    with torch.inference_mode():
        for number, (value_type, x_dtype, k, block, size) in enumerate(todo, start=1):
            regime, batch = _measure(value_type, x_dtype, k, block, size)
            found.append((regime, batch))
            if progress is not None:
                progress(Progress(number, len(todo), regime, batch))
    return dispatch.Table(tuple(found), f"measured on {dispatch.cpu_name()}, {torch.get_num_threads()} threads")


def _measure(value_type: ValueType, x_dtype: torch.dtype, k: int, block: int, size: int) -> tuple[dispatch.Regime, int]:
    """Up the batches until dense wins; between the last two batches by the ratios' logarithms."""
    generator = torch.Generator().manual_seed(size + k)
    weight = pack(torch.randn(size, size, generator=generator), k, block, value_type=value_type)
    full = dense(weight, x_dtype)
    previous: tuple[int, float] | None = None
    for batch in BATCHES:
        x = torch.randn(batch, size, generator=generator).to(x_dtype)
        ratio = _ratio(lambda x=x: F.linear(x, full), lambda x=x: sparse(x, weight))  # type: ignore[misc]
        if ratio < MARGIN:
            if previous is None:
                return dispatch.regime_of(weight.spec, x_dtype), 1
            # Where the line through (log batch, log ratio) crosses the margin.
            (low, high), span = previous, math.log(batch / previous[0])
            share = math.log(high / MARGIN) / math.log(high / ratio)
            return dispatch.regime_of(weight.spec, x_dtype), max(low + 1, math.floor(low * math.exp(span * share)))
        previous = (batch, ratio)
    return dispatch.regime_of(weight.spec, x_dtype), dispatch.ALWAYS


def _ratio(first: Callable[[], object], second: Callable[[], object]) -> float:
    """Least time of ``first`` / least time of ``second``, alternating: another program can only ever take time away."""
    functions, best = (first, second), [math.inf, math.inf]
    for function in functions:
        function()
    calls, rounds, until = 1, 0, time.perf_counter() + 0.04
    while rounds < 5 or (time.perf_counter() < until and rounds < 25):
        times = []
        for function in functions:
            began = time.perf_counter()
            for _ in range(calls):
                function()
            times.append((time.perf_counter() - began) / calls)
        if times[0] * calls < 1e-3 and calls < 256:
            calls *= 2  # the first of few calls, with its weight out of the cache, would be most of the time
            continue
        best = [min(pair) for pair in zip(best, times, strict=True)]
        rounds += 1
    return best[0] / best[1]
