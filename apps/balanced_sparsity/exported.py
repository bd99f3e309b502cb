"""From a pruned network to a file of packed weights, checked against the network that it came from."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from apps.balanced_sparsity.config import BalancedSparsityConfig
from apps.balanced_sparsity.pruning.packing import PackingError, PackingReport, load_packed, pack_, save_packed
from apps.balanced_sparsity.pruning.patterns import Pattern
from apps.balanced_sparsity.store import Trained
from apps.balanced_sparsity.training.loop import evaluate
from apps.balanced_sparsity.training.tasks import make_task
from apps.program.errors import UserError
from apps.training.worker import LocalWorker
from kernels.balanced.spec import VALUE_TYPES, ValueType


@dataclass(frozen=True)
class Exported:
    """What `export` wrote, and what it is worth."""

    pattern: str
    value_type: str
    file_bytes: int
    dense_bytes: int
    """Of all of the network's tensors, dense, as they are in memory."""
    packed_weights: int
    """Matrices that are packed."""
    dense_weights: int
    """Matrices that stayed dense: skipped by pruning, or not smaller when packed."""
    score: str
    pruned_score: float
    """Of the pruned network as dense matrices."""
    packed_score: float
    """Of the file, loaded again and computed with the packed weights."""


def export_packed(trained: Trained, path: Path, value_type: str, config: BalancedSparsityConfig) -> Exported:
    """Packs ``trained`` into ``path``, loads the file again, and scores it.

    Raises:
        UserError: it was not pruned with a balanced pattern, there is no such value type, the file cannot be written.
    """
    if value_type not in VALUE_TYPES:
        raise UserError(f"There is no value type {value_type!r}: give --value-type {', '.join(VALUE_TYPES)}.")
    if trained.pattern is None:
        raise UserError("The network is dense: `prune` it with a balanced pattern first.")
    pattern = Pattern.parse(trained.pattern)
    if pattern.kind not in ("balanced", "2:4"):
        raise UserError(f"The network was pruned with {pattern}; only balanced patterns and 2:4 can be packed.")
    worker = LocalWorker()
    task = make_task(config, worker)
    model = trained.model()
    packed = copy.deepcopy(model)
    report = _pack(packed, value_type, pattern)  # type: ignore[arg-type]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_packed(packed, path)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}.") from error
    loaded = load_exported(copy.deepcopy(model), path)
    return Exported(
        pattern=str(pattern),
        value_type=value_type,
        file_bytes=path.stat().st_size,
        dense_bytes=report.dense_bytes,
        packed_weights=sum(layer.k > 0 for layer in report.layers),
        dense_weights=sum(layer.k == 0 for layer in report.layers),
        score=trained.score,
        pruned_score=evaluate(model, task, worker)[trained.score],
        packed_score=evaluate(loaded, task, worker)[trained.score],
    )


def load_exported(model: nn.Module, path: Path) -> nn.Module:
    """The packed file in the dense architecture ``model``, whose layers it replaces.

    Raises:
        UserError: it is of another model. BalancedFormatError: no such file, or a tampered one.
    """
    try:
        return load_packed(model, path).eval()
    except PackingError as error:
        raise UserError(f"{path}: {error}") from error


def _pack(model: nn.Module, value_type: ValueType, pattern: Pattern) -> PackingReport:
    try:
        return pack_(model, value_type, pattern.columns, pattern.rows)
    except PackingError as error:
        raise UserError(f"The network cannot be packed: {error}") from error
