"""Optimizers and schedules: Muon with AdamW, warm-up-stable-decay, the running mean of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from apps.mcmisp.training.config import TrainingConfig


class Optimizers:
    """Muon for matrices inside of layers, AdamW for embeddings, heads and gains; or AdamW alone."""

    def __init__(self, model: nn.Module, config: TrainingConfig):
        matrices, others, plain = [], [], []
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ".layers." in f".{name}" and config.optimizer == "muon":
                matrices.append(parameter)
            elif parameter.ndim >= 2:
                others.append(parameter)
            else:
                plain.append(parameter)  # gains and biases are not decayed
        groups = [{"params": others, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-8
        )
        self.all: list[torch.optim.Optimizer] = [adamw]
        if matrices:
            self.all.append(
                torch.optim.Muon(
                    matrices, lr=config.learning_rate, weight_decay=config.weight_decay, momentum=0.95,
                    adjust_lr_fn="match_rms_adamw",
                )
            )  # fmt: skip
        self._peak = config.learning_rate

    def step(self, factor: float) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = self._peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)


def rate_factor(config: TrainingConfig, step: int) -> float:
    """Share of the peak rate in ``step``: linear warm-up, then 1, then linear to zero (Hu et al. 2024, WSD)."""
    warmup = round(config.warmup_fraction * config.steps)
    decay = round(config.decay_fraction * config.steps)
    rise = (step + 1) / warmup if step < warmup else 1.0
    fall = (config.steps - step) / (decay + 1) if step >= config.steps - decay else 1.0
    return min(rise, fall)


class RunningMean:
    """Exponential mean of parameters, its decay warmed up so that the first weights are soon forgotten."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.decay, self.count = decay, 0
        self._parameters = list(parameters)
        self.values = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, [p.detach() for p in self._parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Puts the mean into the model and the model's weights here; called again it undoes that."""
        for parameter, value in zip(self._parameters, self.values, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(held)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        for mine, theirs in zip(self.values, state["values"], strict=True):
            mine.copy_(theirs)


__all__ = ["Optimizers", "RunningMean", "rate_factor"]
