"""What calibration batches say of each weight's inputs: the Hessian X^T X of its layer-wise error, gathered by hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from apps.balanced_sparsity.pruning.views import PrunableWeight


@dataclass
class InputStatistics:
    """Of one weight: ``hessian`` float32 [groups, columns, columns], the sum of x x^T over ``samples`` inputs x of a group.

    A convolution of g groups has g of them, each for its own part of the rows; everything else has one.
    """

    hessian: torch.Tensor
    samples: int = 0

    def add(self, inputs: torch.Tensor) -> None:
        """``inputs`` [groups, samples, columns]."""
        x = inputs.detach().to(self.hessian.device, torch.float32)
        self.hessian.baddbmm_(x.transpose(1, 2), x)
        self.samples += x.shape[1]

    def norms(self) -> torch.Tensor:
        """Root of the summed squares of each input: [groups, columns]."""
        return self.hessian.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()


@contextmanager
def observed(weights: Iterable[PrunableWeight]) -> Iterator[dict[str, InputStatistics]]:
    """While it is open, forward passes of the modules are added to the statistics, by the weights' names.

    Raises TypeError in the forward pass of an LSTM or GRU that is given a packed sequence.
    """
    statistics: dict[str, InputStatistics] = {}
    by_module: dict[nn.Module, list[PrunableWeight]] = {}
    for weight in weights:
        groups = getattr(weight.module, "groups", 1)
        statistics[weight.name] = InputStatistics(
            torch.zeros(groups, weight.columns, weight.columns, device=weight.parameter.device)
        )
        by_module.setdefault(weight.module, []).append(weight)

    def watch(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        x = arguments[0] if arguments else keywords["input"]
        with torch.no_grad():
            inputs: dict[str, torch.Tensor]
            if isinstance(module, nn.RNNBase):
                state = arguments[1] if len(arguments) > 1 else keywords.get("hx")
                inputs = _recurrent_inputs(module, x, state)
            else:
                inputs = {"weight": _inputs(module, x)}
            for weight in by_module[module]:
                statistics[weight.name].add(inputs[weight.parameter_name])

    handles = [module.register_forward_hook(watch, with_kwargs=True) for module in by_module]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


def _inputs(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the rows of a Linear or convolution multiply: [groups, samples, columns]."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return x.reshape(1, -1, x.shape[-1])
    flat = isinstance(module, nn.Conv1d)
    if x.dim() == (2 if flat else 3):
        x = x.unsqueeze(0)
    if any(module._reversed_padding_repeated_twice):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)

    def two(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *sizes) if flat else sizes

    x = x.unsqueeze(2) if flat else x
    patches = F.unfold(
        x, two(module.kernel_size), two(module.dilation), 0, two(module.stride)
    )  # [batch, columns, places]
    return patches.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def _recurrent_inputs(module: nn.RNNBase, x: Any, state: Any) -> dict[str, torch.Tensor]:
    """Inputs of every weight of an LSTM, GRU or RNN: its frames, and the outputs of the step before. Layers run one by one."""
    if not isinstance(x, torch.Tensor):
        raise TypeError("calibration of an LSTM or GRU takes padded sequences, not packed ones")
    x = x.unsqueeze(1) if x.dim() == 2 else x.transpose(0, 1) if module.batch_first else x
    ways = 2 if module.bidirectional else 1
    width = getattr(module, "proj_size", 0) or module.hidden_size
    first = None if state is None else state[0] if isinstance(state, tuple) else state
    inputs: dict[str, torch.Tensor] = {}
    for layer in range(module.num_layers):
        outputs = []
        for way in range(ways):
            names = module._all_weights[layer * ways + way]
            frames = x.flip(0) if way else x
            start = x.new_zeros(1, x.shape[1], width)
            if first is not None:
                start = first[layer * ways + way].reshape(1, -1, width)
            ran, _ = _one_layer(module, names, frames.shape[2])(frames, _state_of(module, state, layer * ways + way))
            inputs[names[0]] = frames.reshape(1, -1, frames.shape[2])
            inputs[names[1]] = torch.cat((start, ran[:-1])).reshape(1, -1, width)
            outputs.append(ran.flip(0) if way else ran)
        x = torch.cat(outputs, dim=2)
    return inputs


def _state_of(module: nn.RNNBase, state: Any, number: int) -> Any:
    if state is None:
        return None
    if isinstance(state, tuple):
        return tuple(part[number].reshape(1, -1, part.shape[-1]) for part in state)
    return state[number].reshape(1, -1, state.shape[-1])


def _one_layer(module: nn.RNNBase, names: list[str], features: int) -> nn.RNNBase:
    """One layer and direction of ``module`` as a module of its own, over copies of its weights."""
    more: dict[str, Any] = {"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}
    if getattr(module, "proj_size", 0):
        more["proj_size"] = module.proj_size
    like = getattr(module, names[0])
    kind: Any = type(module)
    layer = kind(features, module.hidden_size, bias=module.bias, device=like.device, dtype=like.dtype, **more)
    for own, theirs in zip(layer._all_weights[0], names, strict=True):
        getattr(layer, own).copy_(getattr(module, theirs))
    return layer
