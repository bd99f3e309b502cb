"""Which k columns of every block are kept: exactly k, deterministic, for every float there is. C++ where it can be built."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn import functional as F

from kernels.balanced.spec import BalancedFormatError


@lru_cache(maxsize=1)
def cpp() -> bool:
    """Whether the C++ kernels of this room can be loaded; the reason why not is logged once."""
    from kernels import build

    return bool(build.load("balanced"))


def select_reference(scores: torch.Tensor, k: int, block: int) -> torch.Tensor:
    """The rule in plain torch: positions within their block, ascending, uint8 [groups, blocks, k].

    Kept are the ``k`` greatest scores of a block; NaN is greater than infinity (a broken weight must not vanish), and of equal
    scores the lower column wins. Columns beyond the last one come after all real ones.
    """
    columns = scores.shape[1]
    blocks = -(-columns // block)
    padded = F.pad(scores, (0, blocks * block - columns), value=-float("inf"))
    order = torch.sort(padded.view(-1, blocks, block), dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(dim=-1).values.to(torch.uint8)


def select(scores: torch.Tensor, k: int, block: int) -> torch.Tensor:
    """Positions [groups, blocks, k] (uint8, ascending) of the ``k`` greatest of every ``block`` scores [groups, columns].

    Any float dtype; see ``select_reference`` for NaN and ties. Raises BalancedFormatError for a score that is no float matrix.
    """
    if scores.dim() != 2 or not scores.is_floating_point():
        raise BalancedFormatError(f"scores must be a float matrix, got {scores.dtype} {tuple(scores.shape)}")
    exact = scores.float() if scores.dtype != torch.float64 else scores
    if exact.device.type == "cpu" and exact.dtype == torch.float32 and cpp():
        return torch.ops.sextant.balanced_select(exact.contiguous(), k, block)
    return select_reference(exact, k, block)


def magnitude_scores(weight: torch.Tensor, vector: int = 1) -> torch.Tensor:
    """|w|, and for ``vector`` rows that choose together the sum of it: [ceil(rows / vector), columns]."""
    if vector == 1:
        return weight.detach().abs()
    padded = F.pad(weight.detach().double().abs(), (0, 0, 0, -weight.shape[0] % vector))
    return padded.view(-1, vector, weight.shape[1]).sum(dim=1).float()
