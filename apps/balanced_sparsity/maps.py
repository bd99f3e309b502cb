"""What can be seen of pruned weights: zeros and balance of each matrix, and the corner of one for the weight maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from apps.balanced_sparsity.pictures import MAP_SIDE
from apps.balanced_sparsity.pruning.views import prunable


@dataclass(frozen=True)
class LayerCount:
    """One matrix [rows, columns] as pruning sees it."""

    name: str
    rows: int
    columns: int
    zeros: float
    """Share of zeros."""
    least: int
    most: int
    """Non-zeros in the block with fewest and in that with most, of whole blocks of ``block`` columns."""
    block: int


def layer_counts(model: nn.Module, block: int, skip: Sequence[str] = ()) -> list[LayerCount]:
    """Of every matrix that can be pruned. ``block``: columns of the blocks that are counted in."""
    return [_count(name, matrix, block) for name, matrix in matrices(model, skip)]


def corner(model: nn.Module, skip: Sequence[str] = ()) -> NDArray[np.float32]:
    """The first rows and columns of the largest matrix that can be pruned, float32."""
    found = matrices(model, skip)
    _, largest = max(found, key=lambda item: item[1].numel())
    return largest[:MAP_SIDE, :MAP_SIDE].float().cpu().numpy().copy()


def matrices(model: nn.Module, skip: Sequence[str] = ()) -> list[tuple[str, torch.Tensor]]:
    """(name, [rows, columns]) of every weight that can be pruned, convolutions as pruning lays them out."""
    return [(weight.name, weight.matrix()) for weight in prunable(model, skip)]


def _count(name: str, matrix: torch.Tensor, block: int) -> LayerCount:
    rows, columns = matrix.shape
    kept = matrix != 0
    whole = columns // block * block
    counts = kept[:, :whole].reshape(rows, -1, block).sum(2) if whole else kept.sum(1, keepdim=True)
    zeros = 1 - float(kept.float().mean())
    return LayerCount(name, rows, columns, zeros, int(counts.min()), int(counts.max()), block)
