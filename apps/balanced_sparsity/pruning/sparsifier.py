"""The gradual sparsifier: rising sparsity by in-block thresholds while a network trains on, then masks baked into the weights.

    sparsifier = Sparsifier(Pattern.balanced(32), GradualSchedule(0.0, 0.75, 0, 1000, 50), skip=("classifier",))
    sparsifier.prepare(model)
    for batch in data:
        loss(model, batch).backward()
        optimizer.step()
        sparsifier.step()
    sparsifier.squash()

Pruned entries are zeroed in the weights themselves and stay zero: the state dict, DDP, compiled models and an LSTM's flat weights
see ordinary parameters. After Yao et al. (AAAI 2019): sort a block, zero what is below its threshold, retrain, raise, repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from apps.balanced_sparsity.pruning.patterns import Pattern, mask_of
from apps.balanced_sparsity.pruning.schedule import GradualSchedule
from apps.balanced_sparsity.pruning.views import PrunableWeight, prunable


class _Masked:
    """One weight, its mask, and the hook that masks its gradient."""

    def __init__(self, weight: PrunableWeight):
        self.weight = weight
        self.mask = torch.ones_like(weight.parameter, dtype=torch.bool)
        self.dense = True
        self._hooked: torch.Tensor | None = None
        self._hook: RemovableHandle | None = None

    @torch.no_grad()
    def choose(self, pattern: Pattern, sparsity: float) -> None:
        """New masks by magnitude. What was zeroed has the lowest score of all, and so stays out."""
        scores = self.weight.matrix().abs().masked_fill(~self.weight_mask(), -1.0)
        self.set(self.weight.shaped(mask_of(scores, pattern, sparsity)))

    def weight_mask(self) -> torch.Tensor:
        return self.mask.to(self.weight.parameter.device).flatten(1)

    def set(self, mask: torch.Tensor) -> None:
        self.mask = mask.to(self.weight.parameter.device)
        self.dense = bool(mask.all())

    @torch.no_grad()
    def apply(self) -> None:
        """Zeroes what is not kept; also what an optimizer's momentum has moved."""
        parameter = self.weight.parameter
        self._watch(parameter)
        if self.dense:
            return
        if self.mask.device != parameter.device:
            self.mask = self.mask.to(parameter.device)
        parameter.masked_fill_(~self.mask, 0.0)  # a product would keep NaN and infinity

    def remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._hooked = None

    def _watch(self, parameter: torch.Tensor) -> None:
        """Masks the gradients of the parameter, which a module may have replaced since."""
        if self._hooked is not parameter:
            self.remove()
            self._hooked = parameter
            self._hook = parameter.register_hook(self._mask_gradient) if parameter.requires_grad else None

    def _mask_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient if self.dense else gradient.masked_fill(~self.mask.to(gradient.device), 0.0)


class Sparsifier:
    """Prunes a model in ``pattern`` as ``schedule`` says. ``skip``: see ``views.prunable``.

    Raises ValueError for a schedule whose sparsity the pattern cannot have.
    """

    def __init__(self, pattern: Pattern, schedule: GradualSchedule, skip: Sequence[str] = ()):
        pattern.check(schedule.final)
        self.pattern, self.schedule, self.skip = pattern, schedule, tuple(skip)
        self.steps = 0
        """Calls of ``step`` so far."""
        self._target = 0.0
        self._masked: dict[str, _Masked] | None = None

    def prepare(self, model: nn.Module) -> None:
        """Takes a model over; prunes at once if the schedule begins at step 0 with a sparsity above 0.

        Before or after an optimizer is made of its parameters, which stay the same objects; and before it is wrapped (DDP).

        Raises:
            ValueError: there is nothing to prune in it, or ``skip`` names what is not there.
        """
        if self._masked is not None:
            raise ValueError("this sparsifier has a model already: squash it first, or make another sparsifier")
        weights = prunable(model, self.skip)
        if not weights:
            raise ValueError("the model has no weight that can be pruned (Linear, Conv1d, Conv2d, LSTM, GRU)")
        self._masked = {weight.name: _Masked(weight) for weight in weights}
        self.steps, self._target = 0, 0.0
        self._advance()

    def step(self) -> None:
        """Once after every optimizer step: raises the sparsity when it is due, and keeps what is pruned at zero."""
        self._prepared()
        self.steps += 1
        self._advance()

    def _advance(self) -> None:
        target = self.schedule.sparsity(self.steps)
        rises, self._target = target != self._target, target
        for masked in self._prepared().values():
            if rises:
                masked.choose(self.pattern, target)
            masked.apply()

    def masks(self) -> dict[str, torch.Tensor]:
        """Name of each parameter -> its mask, bool of its shape."""
        return {name: masked.mask for name, masked in self._prepared().items()}

    def sparsity(self) -> dict[str, float]:
        """Name of each parameter -> share of its entries that is pruned now."""
        return {name: 1 - float(mask.float().mean()) for name, mask in self.masks().items()}

    def overall_sparsity(self) -> float:
        """Share of all entries of all weights taken together that is pruned now."""
        masks = self.masks().values()
        return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def squash(self) -> None:
        """Bakes the masks into the weights and lets go of the model: pruned entries are zeros, no hook is left."""
        for masked in self._prepared().values():
            masked.apply()
            masked.remove()
        self._masked = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside the model's own state dict."""
        return {
            "pattern": str(self.pattern),
            "steps": self.steps,
            "target": self._target,
            "masks": {name: mask.clone() for name, mask in self.masks().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where ``state`` was taken; call it after ``prepare`` and after the model's weights were loaded.

        Raises:
            ValueError: it is of another pattern or another model.
        """
        own = self._prepared()
        if state["pattern"] != str(self.pattern):
            raise ValueError(f"the state is of pattern {state['pattern']}, this sparsifier's is {self.pattern}")
        masks: dict[str, torch.Tensor] = state["masks"]
        if set(masks) != set(own):
            raise ValueError(f"the state is of another model: {', '.join(sorted(set(masks) ^ set(own)))} differ")
        for name, masked in own.items():
            if masks[name].shape != masked.weight.parameter.shape or masks[name].dtype != torch.bool:
                raise ValueError(
                    f"the mask of {name} is {masks[name].dtype} {list(masks[name].shape)}, not its weight's shape"
                )
        self.steps, self._target = int(state["steps"]), float(state["target"])
        for name, masked in own.items():
            masked.set(masks[name].clone())
            masked.apply()

    def _prepared(self) -> dict[str, _Masked]:
        if self._masked is None:
            raise ValueError("call prepare(model) first")
        return self._masked
