"""Contestants of ``benchmarks.balanced_kernels_cpu``: weights kept out of the cache, CSR of torch and scipy, a copy."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

Item = TypeVar("Item")


class Cold(Generic[Item]):
    """Copies of one weight, handed out in turn: together so many bytes that each has left the cache when its turn comes."""

    def __init__(
        self, items: list[Item], copy: Callable[[Item], Item], total_bytes: int, nbytes: Callable[[Item], int]
    ):
        self.items = list(items)
        while sum(map(nbytes, self.items)) < total_bytes or len(self.items) < 2:
            self.items.append(copy(self.items[0]))
        self._turn = 0

    def next(self) -> Item:
        """The one that was used longest ago."""
        self._turn = (self._turn + 1) % len(self.items)
        return self.items[self._turn]


def last_level_cache_bytes() -> int:
    """Of the first core, as Linux tells; 32 MiB where it does not."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG])", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) << {"K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes, default=32 << 20)


def copy_bandwidth(num_bytes: int) -> Callable[[], float]:
    """An arm that copies a buffer far larger than any cache and returns GB/s, read and written bytes together."""
    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)

    def copy() -> float:
        began = time.perf_counter()
        target.copy_(source)
        return 2 * source.nbytes / (time.perf_counter() - began) / 1e9

    return copy


def stream_bandwidth(num_bytes: int) -> Callable[[], float]:
    """An arm that does nothing but read a buffer in huge pages, sixteen streams side by side, on one core: GB/s."""
    buffer = torch.ops.sextant.balanced_memory(num_bytes).fill_(1)

    def read() -> float:
        began = time.perf_counter()
        torch.ops.sextant.stream_read(buffer)
        return buffer.nbytes / (time.perf_counter() - began) / 1e9

    return read


def csr_arms(dense: torch.Tensor, x: torch.Tensor, cold_bytes: int) -> dict[str, Callable[[], Any]]:
    """``dense`` [rows, columns] as CSR of torch (MKL where it has it) and scipy, 32-bit indices, times ``x`` [1, columns]."""
    import scipy.sparse

    by_scipy = scipy.sparse.csr_matrix(dense.numpy())
    crow, col = (torch.from_numpy(array).int() for array in (by_scipy.indptr, by_scipy.indices))
    by_torch = torch.sparse_csr_tensor(crow, col, torch.from_numpy(by_scipy.data), dense.shape, check_invariants=False)
    column, array = x.t().contiguous(), x.numpy().reshape(-1)

    def size(_: object) -> int:
        return by_scipy.data.nbytes + by_scipy.indices.nbytes

    torch_cold = Cold([by_torch], torch.clone, cold_bytes, size)
    scipy_cold = Cold([by_scipy], lambda matrix: matrix.copy(), cold_bytes, size)
    return {"torch CSR": lambda: torch_cold.next() @ column, "scipy CSR": lambda: scipy_cold.next() @ array}
