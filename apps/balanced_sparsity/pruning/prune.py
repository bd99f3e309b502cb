"""``BalancedPruning`` in the shape of torch.nn.utils.prune: ``weight_orig``, ``weight_mask``, and ``prune.remove`` to end it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from apps.balanced_sparsity.pruning.patterns import Pattern, mask_of
from apps.balanced_sparsity.pruning.views import as_matrix


class BalancedPruning(prune.BasePruningMethod):
    """Keeps the k entries of highest importance (magnitude by default) in every ``block`` columns of a row, zeroes the others.

    k is the nearest integer to (1 - sparsity) x block. Entries that an earlier pruning of the same weight dropped stay dropped.
    """

    PRUNING_TYPE = "global"  # torch hands the whole tensor over then, not the entries that are left in a row

    def __init__(self, block: int, sparsity: float, vector: int = 1):
        super().__init__()
        self.pattern, self.sparsity = Pattern.balanced(block, vector), sparsity
        self.pattern.check(sparsity)

    def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
        """The mask, of ``t``'s shape and ``default_mask``'s dtype."""
        kept = as_matrix(default_mask.bool())
        scores = as_matrix(t.detach().abs()).masked_fill(~kept, -float("inf"))
        mask = mask_of(scores, self.pattern, self.sparsity) & kept
        return mask.view(t.shape).to(default_mask.dtype)

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        module: nn.Module,
        name: str,
        block: int,
        sparsity: float,
        vector: int = 1,
        importance_scores: torch.Tensor | None = None,
    ) -> Any:
        """Adds the mask, the original and the hook that joins them to ``module``."""
        return super().apply(module, name, block, sparsity, vector, importance_scores=importance_scores)


def balanced(
    module: nn.Module,
    name: str,
    block: int,
    sparsity: float,
    vector: int = 1,
    importance_scores: torch.Tensor | None = None,
) -> nn.Module:
    """Prunes parameter ``name`` of ``module`` (LSTM's ``weight_hh_l0`` as well as Linear's ``weight``), and returns ``module``.

    The parameter becomes ``<name>_orig`` with a buffer ``<name>_mask``; ``torch.nn.utils.prune.remove`` makes it permanent.

    Args:
        importance_scores: like the parameter; its magnitudes by default.

    Raises:
        ValueError: a block or sparsity that cannot be. AttributeError: no such parameter.
    """
    BalancedPruning.apply(module, name, block, sparsity, vector, importance_scores=importance_scores)
    return module
