"""The learning rate as a pure function of the step, and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from apps.balanced_sparsity.config import TrainingConfig


def learning_rate(training: TrainingConfig, base: float, step: int, steps: int, epoch_steps: int) -> float:
    """Of ``step`` (from 0) of ``steps``.

    ``cosine``: base / 2 (1 + cos(pi step / steps)) (Loshchilov & Hutter, 2017). ``step``: base / decay^max(0, epoch + 1 - after),
    epochs from 0 (Zaremba et al., 2014: after epoch 6 divide by 1.2 each epoch). During ``warmup_steps`` it rises linearly.
    """
    rate = base
    if training.schedule == "cosine":
        rate = base / 2 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
    elif training.schedule == "step":
        rate = base / training.decay ** max(0, step // epoch_steps + 1 - training.decay_after_epochs)
    if step < training.warmup_steps:
        rate *= (step + 1) / training.warmup_steps
    return rate


def make_optimizer(training: TrainingConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """SGD or AdamW; the loop sets the rate in each step."""
    mine = [parameter for parameter in parameters if parameter.requires_grad]
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            mine, lr=training.learning_rate, momentum=training.momentum, weight_decay=training.weight_decay
        )
    return torch.optim.AdamW(mine, lr=training.learning_rate, weight_decay=training.weight_decay)
