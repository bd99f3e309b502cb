"""A trained model as one file: weights, the configuration they were trained with, figures and the course of the training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apps.balanced_sparsity.config import BalancedSparsityConfig
from apps.balanced_sparsity.models.build import Shape, build_model
from apps.program.errors import UserError
from apps.training.checkpoint import load_tensors, save_tensors

MODEL_FILE = "model.pt"
VERSION = 1


@dataclass(frozen=True)
class Trained:
    """A dense or pruned network at the end of its training; a pruned one's weights hold the zeros."""

    config: BalancedSparsityConfig
    shape: Shape
    labels: tuple[str, ...]
    weights: dict[str, torch.Tensor]
    steps: int
    figures: dict[str, float]
    score: str
    pattern: str | None = None
    sparsity: float = 0.0
    """Share of zeros in the weights that were pruned."""
    history: tuple[dict[str, float], ...] = field(default=(), repr=False)

    def model(self) -> nn.Module:
        """The network, in evaluation mode.

        Raises:
            UserError: the weights are not those of the configured network.
        """
        model = build_model(self.config.model, self.shape)
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            raise UserError(f"The weights do not fit the configured model: {' '.join(str(error).split())}.") from error
        return model.eval()


def save_trained(path: Path, trained: Trained) -> None:
    """Writes the file; it appears whole or not at all."""
    content = {
        "version": VERSION,
        "config": trained.config.model_dump_json(),
        "shape": vars(trained.shape),
        "labels": list(trained.labels),
        "weights": {name: tensor.detach().cpu() for name, tensor in trained.weights.items()},
        "steps": trained.steps,
        "figures": trained.figures,
        "score": trained.score,
        "pattern": trained.pattern,
        "sparsity": trained.sparsity,
        "history": list(trained.history),
    }
    save_tensors(path, content)


def load_trained(path: str | Path) -> Trained:
    """Reads what ``save_trained`` wrote; ``path`` may be a run folder.

    Raises:
        UserError: no such file, or another one.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / MODEL_FILE
    content: Any = load_tensors(path)
    if not isinstance(content, dict) or "version" not in content or "weights" not in content:
        raise UserError(f"{path} is no model of this app; `train` and `prune` write one (model.pt).")
    if content["version"] != VERSION:
        raise UserError(f"{path} has version {content['version']}; this program reads version {VERSION}.")
    try:
        return Trained(
            config=BalancedSparsityConfig.model_validate_json(content["config"]),
            shape=Shape(**content["shape"]),
            labels=tuple(content["labels"]),
            weights=content["weights"],
            steps=content["steps"],
            figures=content["figures"],
            score=content["score"],
            pattern=content["pattern"],
            sparsity=content["sparsity"],
            history=tuple(content["history"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a whole model of this app: {error}") from error
