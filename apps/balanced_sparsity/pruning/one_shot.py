"""One-shot pruning from calibration batches: by magnitude, Wanda's scores, or SparseGPT's updates; and exact reconstruction.

A weight's layer-wise error is |(W - W') x|^2 over its calibration inputs x; H = X^T X describes it. Wanda (Sun et al., 2023)
scores |w| |x|; SparseGPT (Frantar & Alistarh, 2023) drops columns one by one and lets the later columns make up for each (OBS).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from apps.balanced_sparsity.pruning.calibration import InputStatistics, observed
from apps.balanced_sparsity.pruning.patterns import Pattern, mask_of
from apps.balanced_sparsity.pruning.views import prunable

Method = Literal["magnitude", "wanda", "sparsegpt"]
DAMPING = 0.01
"""Added to the Hessian's diagonal: this share of its mean (SparseGPT's default)."""
WINDOW = 128
"""Columns that are updated together, and that the masks of patterns without own blocks of columns are chosen within."""


def one_shot_(
    model: nn.Module,
    pattern: Pattern,
    sparsity: float,
    method: Method = "wanda",
    calibration: Iterable[Any] = (),
    *,
    skip: Sequence[str] = (),
    forward: Callable[[nn.Module, Any], Any] | None = None,
    reconstruct: bool = False,
) -> dict[str, torch.Tensor]:
    """Prunes all prunable weights of ``model`` in place; returns their masks (bool, of the parameters' shapes) by name.

    Args:
        calibration: batches that the model is run on, once; ``magnitude`` without ``reconstruct`` needs none. Inputs of all
            layers are those of the dense model.
        skip: see ``views.prunable``.
        forward: runs one batch; by default ``model(batch)``, or ``model(*batch)`` for a tuple or list.
        reconstruct: set what is kept to the least-squares optimum of the layer-wise error (``reconstructed``).

    Raises:
        ValueError: an unknown method, a sparsity that the pattern cannot have, nothing to prune, or no calibration batches.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}")
    pattern.check(sparsity)
    weights = prunable(model, skip)
    if not weights:
        raise ValueError("the model has no weight that can be pruned (Linear, Conv1d, Conv2d, LSTM, GRU)")
    needed = method != "magnitude" or reconstruct
    statistics: dict[str, InputStatistics] = {}
    if needed:
        was_training = model.training
        model.eval()
        with observed(weights) as statistics, torch.no_grad():
            for batch in calibration:
                _run(model, batch, forward)
        model.train(was_training)
        unseen = [name for name, found in statistics.items() if found.samples == 0]
        if unseen:
            raise ValueError(f"no calibration batch reached {', '.join(unseen)[:200]}: {method} needs some")
    masks = {}
    for weight in weights:
        found = statistics.get(weight.name)
        pruned, mask = pruned_matrix(weight.matrix(), pattern, sparsity, method, found)
        if reconstruct and found is not None:
            pruned = reconstructed(weight.matrix(), mask, found)
        weight.write(pruned)
        masks[weight.name] = weight.shaped(mask)
        statistics.pop(weight.name, None)  # Hessians are large
    return masks


def pruned_matrix(
    matrix: torch.Tensor, pattern: Pattern, sparsity: float, method: Method, statistics: InputStatistics | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(pruned weight, mask) of one matrix [rows, columns]; ``statistics`` of its inputs for wanda and sparsegpt.

    SparseGPT chooses unstructured and block masks window by window (``WINDOW`` columns), each at the same sparsity.
    """
    if method == "magnitude":
        mask = mask_of(matrix.abs(), pattern, sparsity)
        return matrix.masked_fill(~mask, 0.0), mask
    if statistics is None:
        raise ValueError(f"{method} needs calibration inputs")
    parts = matrix.chunk(statistics.hessian.shape[0])
    if method == "wanda":
        scores = torch.cat([part.abs() * norm for part, norm in zip(parts, statistics.norms(), strict=True)])
        mask = mask_of(scores, pattern, sparsity)
        return matrix.masked_fill(~mask, 0.0), mask
    done = [sparsegpt(part, h, pattern, sparsity) for part, h in zip(parts, statistics.hessian, strict=True)]
    return torch.cat([weight for weight, _ in done]).to(matrix.dtype), torch.cat([mask for _, mask in done])


def sparsegpt(
    matrix: torch.Tensor, hessian: torch.Tensor, pattern: Pattern, sparsity: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(pruned and updated weight float32, mask) of ``matrix`` [rows, columns] with ``hessian`` [columns, columns] = X^T X.

    Columns go from left to right. A block's mask is chosen when its first column comes, by w^2 / c_jj^2 with c the upper Cholesky
    factor of H^-1 (SparseGPT, algorithm 1), whose squared diagonal is that of the inverse of the columns not yet done; each
    dropped entry is made up for by the columns to its right: the OBS update (Hassibi & Stork, 1993, eq. 5).
    """
    weight = matrix.detach().float().clone()
    columns = weight.shape[1]
    inverse = _inverse_factor(hessian)
    width = pattern.columns if pattern.kind in ("balanced", "2:4") else -(-WINDOW // pattern.columns) * pattern.columns
    step = -(-WINDOW // width) * width
    mask = torch.ones_like(weight, dtype=torch.bool)
    for begin in range(0, columns, step):
        end = min(begin + step, columns)
        part, factor = weight[:, begin:end].clone(), inverse[begin:end, begin:end]
        errors = torch.zeros_like(part)
        for column in range(end - begin):
            if column % width == 0:
                here = slice(column, min(column + width, end - begin))
                scores = part[:, here].square() / factor.diagonal()[here].square()
                mask[:, begin + here.start : begin + here.stop] = mask_of(scores, pattern, sparsity)
            dropped = part[:, column].masked_fill(mask[:, begin + column], 0.0)
            errors[:, column] = dropped / factor[column, column]
            part[:, column:] -= errors[:, column, None] * factor[None, column, column:]
        weight[:, begin:end] = part
        weight[:, end:] -= errors @ inverse[begin:end, end:]
    return weight.masked_fill_(~mask, 0.0), mask


def reconstructed(
    matrix: torch.Tensor, mask: torch.Tensor, statistics: InputStatistics, cross: torch.Tensor | None = None
) -> torch.Tensor:
    """The kept entries of every row at the least-squares optimum: the W' on ``mask`` that is nearest to W on the inputs.

    Row by row, w'_S = (H_SS)^-1 (H w)_S with the damped H; rows that keep equally many entries are solved together.

    Args:
        matrix, mask: [rows, columns].
        cross: [groups, columns, columns], sum of x' x^T, where the pruned model's inputs x' (``statistics``) differ from the
            dense model's x: W' x' is then fitted to W x.
    """
    groups = statistics.hessian.shape[0]
    out = torch.zeros_like(matrix, dtype=torch.float32)
    rows_of_group = matrix.shape[0] // groups
    for group in range(groups):
        rows = slice(group * rows_of_group, (group + 1) * rows_of_group)
        hessian, weight = statistics.hessian[group], matrix[rows].float()
        damped = _damped(hessian)
        # The damping pulls towards the dense weight, not towards zero.
        target = weight @ (damped if cross is None else cross[group].T + (damped - hessian))
        out[rows] = _solve_rows(damped, target, mask[rows])
    return out.to(matrix.dtype)


def _solve_rows(
    hessian: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, entries: int = 1 << 24
) -> torch.Tensor:
    """Each row's (H_SS)^-1 t_S on its kept columns S, ``entries`` of gathered matrices at a time."""
    out = torch.zeros_like(target)
    counts = mask.sum(dim=1)
    for count in counts.unique().tolist():
        if count == 0:
            continue
        rows = (counts == count).nonzero()[:, 0]
        for some in rows.split(max(1, entries // count**2)):
            kept = mask[some].nonzero()[:, 1].view(len(some), count)
            system = hessian[kept[:, :, None], kept[:, None, :]]
            right = target[some].gather(1, kept)
            factor, failed = torch.linalg.cholesky_ex(system)
            if bool(failed.any()):
                raise ValueError("the calibration inputs make no positive definite Hessian: are they finite?")
            solved = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
            out[some] = torch.zeros_like(target[some]).scatter_(1, kept, solved)
    return out


def _damped(hessian: torch.Tensor) -> torch.Tensor:
    diagonal = hessian.diagonal()
    damping = max(DAMPING * float(diagonal.mean()), torch.finfo(torch.float32).tiny)
    damping = damping if float(diagonal.mean()) > 0 else 1.0  # inputs that are all zero: any weight will do
    return hessian + damping * torch.eye(len(hessian), device=hessian.device)


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian. ValueError for inputs that are not finite."""
    factor, failed = torch.linalg.cholesky_ex(_damped(hessian.double()))
    if int(failed):
        raise ValueError("the calibration inputs make no positive definite Hessian: are they finite?")
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).float()


def _run(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None) -> None:
    if forward is not None:
        forward(model, batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)
