"""``sparsify_``: prunes a language model layer by layer with calibration text, repairs each layer, distils it for a few steps.

Layer by layer, matrices in the order in which they are computed: SparseGPT chooses what is kept, from the inputs that the layers
pruned before it give; then the kept entries are set to the least-squares fit to what the dense model computes there, so that
errors of earlier layers are made up for. Distillation: Adam on the kept entries, divergence from the dense model's next-token
distribution (Hinton et al., 2015).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from apps.balanced_sparsity.pruning.calibration import InputStatistics
from apps.balanced_sparsity.pruning.one_shot import Method, pruned_matrix, reconstructed
from apps.balanced_sparsity.pruning.patterns import Pattern
from apps.balanced_sparsity.serving.llama import Llama, LlamaLayer

Told = Callable[[str], None]


@dataclass(frozen=True)
class Recovery:
    """How much is done to get back what pruning cost. ``steps`` = 0: no distillation."""

    reconstruct: bool = True
    steps: int = 40
    batch: int = 2
    """Sequences of a step."""
    learning_rate: float = 2e-4
    seed: int = 0


@dataclass(frozen=True)
class Sparsified:
    """What ``sparsify_`` did: masks by the engine's weight names, the layers' relative errors, and the distillation's losses."""

    masks: dict[str, torch.Tensor]
    layer_errors: tuple[float, ...]
    """|x' - x| / |x| of each layer's outputs, dense x, on the calibration text."""
    losses: tuple[float, ...]
    """Nats per token of each distillation step."""


def sparsify_(
    model: Llama,
    token_ids: torch.Tensor,
    pattern: Pattern,
    sparsity: float,
    *,
    method: Method = "sparsegpt",
    recovery: Recovery | None = None,
    skip_layers: Sequence[int] = (),
    told: Told = lambda text: None,
) -> Sparsified:
    """Prunes the seven matrices of every layer in place; embedding, head, norms and biases stay as they are.

    Args:
        token_ids: calibration and recovery text, int64 [sequences, tokens]; some thousand tokens do.
        skip_layers: numbers of layers that stay dense.
        told: is called with a line now and then.

    Raises:
        ValueError: text of a wrong shape, or a sparsity that the pattern cannot have.
    """
    pattern.check(sparsity)
    recovery = recovery or Recovery()
    if token_ids.dim() != 2 or token_ids.shape[0] < 1 or token_ids.shape[1] < 2:
        raise ValueError(f"calibration text is int64 [sequences, tokens], not {list(token_ids.shape)}")
    strangers = [number for number in skip_layers if not 0 <= number < len(model.layers)]
    if strangers:
        raise ValueError(f"there is no layer {strangers[0]} to skip: the model has {len(model.layers)}")
    teacher = copy.deepcopy(model).requires_grad_(False) if recovery.steps else None
    pruner = _Pruner(pattern, sparsity, method, recovery.reconstruct)
    masks, errors = _prune_layers(model, token_ids, pruner, set(skip_layers), told)
    losses = _distil(model, teacher, masks, token_ids, recovery, told) if teacher is not None else []
    named = {f"layers.{number}.{name}": mask for (number, name), mask in masks.items()}
    return Sparsified(named, tuple(errors), tuple(losses))


Masks = dict[tuple[int, str], torch.Tensor]
Angles = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class _Pruner:
    """Prunes matrices, given what they see and what the dense model's see."""

    pattern: Pattern
    sparsity: float
    method: Method
    reconstruct: bool

    def __call__(
        self, layer: LlamaLayer, names: Sequence[str], x: torch.Tensor, dense_x: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Masks of the matrices ``names``, pruned in place; ``x`` and ``dense_x`` [B, T, columns] are their inputs."""
        columns = x.shape[-1]
        inputs = x.reshape(1, -1, columns)
        statistics = InputStatistics(torch.zeros(1, columns, columns))
        statistics.add(inputs)
        cross = inputs.transpose(1, 2) @ dense_x.reshape(1, -1, columns) if self.reconstruct else None
        masks = {}
        for name in names:
            linear: nn.Linear = getattr(layer, name)
            weight = linear.weight.detach().clone()
            pruned, masks[name] = pruned_matrix(weight, self.pattern, self.sparsity, self.method, statistics)
            if self.reconstruct:
                pruned = reconstructed(weight, masks[name], statistics, cross)
            linear.weight.copy_(pruned)
        return masks


@torch.no_grad()
def _prune_layers(
    model: Llama, token_ids: torch.Tensor, pruner: _Pruner, skip: set[int], told: Told
) -> tuple[Masks, list[float]]:
    masks: Masks = {}
    errors = []
    angles = model.angles(token_ids.shape[1])
    dense_x = model.embed(token_ids)
    x = dense_x.clone()
    for number, layer in enumerate(model.layers):
        if number in skip or not isinstance(layer, LlamaLayer):
            x, dense_x = layer(x, *angles), layer(dense_x, *angles)
        else:
            of_layer, x, dense_x = _prune_layer(layer, x, dense_x, angles, pruner)
            masks.update({(number, name): mask for name, mask in of_layer.items()})
        errors.append(float((x - dense_x).norm() / dense_x.norm()))
        told(f"layer {number + 1} of {len(model.layers)}: relative error {errors[-1]:.3f}")
    return masks, errors


def _prune_layer(
    layer: LlamaLayer, x: torch.Tensor, dense_x: torch.Tensor, angles: Angles, pruner: _Pruner
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """(masks, outputs of the pruned layer, of the dense one): the layer's own steps, each matrix pruned before its turn."""
    dense = copy.deepcopy(layer)
    normed, dense_normed = layer.attn_norm(x), dense.attn_norm(dense_x)
    masks = pruner(layer, ("q", "k", "v"), normed, dense_normed)
    attended, dense_attended = layer.attend(normed, *angles), dense.attend(dense_normed, *angles)
    masks |= pruner(layer, ("o",), attended, dense_attended)
    x, dense_x = x + layer.o(attended), dense_x + dense.o(dense_attended)
    normed, dense_normed = layer.ffn_norm(x), dense.ffn_norm(dense_x)
    masks |= pruner(layer, ("gate", "up"), normed, dense_normed)
    gated, dense_gated = layer.gated(normed), dense.gated(dense_normed)
    masks |= pruner(layer, ("down",), gated, dense_gated)
    return masks, x + layer.down(gated), dense_x + dense.down(dense_gated)


def _distil(
    model: Llama, teacher: Llama, masks: Masks, token_ids: torch.Tensor, recovery: Recovery, told: Told
) -> list[float]:
    generator = torch.Generator().manual_seed(recovery.seed)
    trained = [(getattr(model.layers[number], name).weight, mask) for (number, name), mask in masks.items()]
    handles = []
    for parameter, mask in trained:
        parameter.requires_grad_(True)
        handles.append(parameter.register_hook(lambda gradient, dropped=~mask: gradient.masked_fill(dropped, 0.0)))
    optimizer = torch.optim.Adam([parameter for parameter, _ in trained], lr=recovery.learning_rate, betas=(0.9, 0.95))
    losses: list[float] = []
    order: list[int] = []
    warmup = max(1, recovery.steps // 10)
    try:
        for step in range(recovery.steps):
            if len(order) < recovery.batch:
                order += torch.randperm(len(token_ids), generator=generator).tolist()
            picked, order = order[: recovery.batch], order[recovery.batch :]
            share = min((step + 1) / warmup, (recovery.steps - step) / max(1, recovery.steps - warmup))
            optimizer.param_groups[0]["lr"] = recovery.learning_rate * share
            optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for some in token_ids[picked].split(1):  # one sequence at a time: logits of a large vocabulary are large
                with torch.no_grad():
                    target = F.log_softmax(teacher(some), dim=-1)
                loss = F.kl_div(F.log_softmax(model(some), dim=-1), target, log_target=True, reduction="sum")
                loss = loss / some.numel() / len(picked)
                loss.backward()
                total += float(loss.detach())
            optimizer.step()
            losses.append(total)
            told(f"distillation step {step + 1} of {recovery.steps}: {total:.3f} nats per token")
    finally:
        for handle in handles:
            handle.remove()
        for parameter, _ in trained:
            parameter.requires_grad_(False)
            parameter.grad = None
    return losses
