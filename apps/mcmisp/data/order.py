"""The order of rows as a pure function of the step: windows of rows, shuffled anew in each epoch. Resuming needs no state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from apps.training.position import mix, share_of, steps_per_epoch


@dataclass(frozen=True)
class RowOrder:
    """``rows`` rows in windows of ``window``: an epoch visits windows in their order, a window's rows in one of its own.

    A window is what a reader must hold, so the same order can be followed by random access and by streaming.
    """

    rows: int
    batch: int
    window: int
    seed: int

    def __post_init__(self) -> None:
        steps_per_epoch(self.rows, self.batch)

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.rows, self.batch)

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, position in the epoch's order of the step's first row)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return epoch, index * self.batch

    def window_order(self, epoch: int, window: int) -> torch.Tensor:
        """Row numbers of a window, in the epoch's order."""
        return _window_order(self.rows, self.window, self.seed, epoch, window)

    def at(self, epoch: int, start: int, stop: int) -> torch.Tensor:
        """Row numbers at positions ``start`` to ``stop`` - 1 of an epoch's order."""
        parts = []
        for window in range(start // self.window, -(-stop // self.window)):
            first = window * self.window
            parts.append(self.window_order(epoch, window)[max(0, start - first) : stop - first])
        return torch.cat(parts)

    def batch_rows(self, step: int, rank: int = 0, world_size: int = 1) -> torch.Tensor:
        """This rank's part of the step's global batch; all parts together do not depend on the number of workers."""
        share = share_of(self.batch, world_size)
        epoch, start = self.place(step)
        return self.at(epoch, start + rank * share, start + (rank + 1) * share)


@lru_cache(maxsize=8)
def _window_order(rows: int, size: int, seed: int, epoch: int, window: int) -> torch.Tensor:
    first = window * size
    count = min(size, rows - first)
    return first + torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, epoch, window)))


__all__ = ["RowOrder"]
