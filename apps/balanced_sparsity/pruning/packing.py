"""From a pruned model to a packed one, and to a safetensors file and back: what was zeroed takes no memory or time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from apps.balanced_sparsity.pruning.packed_modules import BalancedConv, BalancedLSTM, Matrix, lstm_names
from apps.balanced_sparsity.pruning.views import as_matrix
from kernels import balanced
from kernels.balanced import BalancedLinear, BalancedWeight
from kernels.balanced.spec import MAX_BLOCK, MIN_BLOCK, TORCH_DTYPES, ValueType

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LSTM)


class PackingError(ValueError):
    """A model that cannot be packed, or a file that does not fit a model; the message says what is wrong."""


@dataclass(frozen=True)
class PackedLayer:
    """What became of one weight. ``k`` is 0 where it stayed dense, and ``why`` then says why."""

    name: str
    rows: int
    columns: int
    k: int
    block: int
    dense_bytes: int
    """Of the weight as the model has it."""
    packed_bytes: int
    """Of the packed weight; of the dense one where it stayed."""
    why: str = ""


@dataclass(frozen=True)
class PackingReport:
    """What became of a model."""

    layers: tuple[PackedLayer, ...]
    other_bytes: int
    """Of all that is no weight of a packed kind of layer: embeddings, norms, biases, buffers."""

    @property
    def dense_bytes(self) -> int:
        """Of the model before."""
        return self.other_bytes + sum(layer.dense_bytes for layer in self.layers)

    @property
    def packed_bytes(self) -> int:
        """Of the model after."""
        return self.other_bytes + sum(layer.packed_bytes for layer in self.layers)


def pack_(model: nn.Module, value_type: ValueType = "fp32", block: int = 32, vector: int = 1) -> PackingReport:
    """Replaces, inside of ``model``, pruned Linear, Conv1d, Conv2d and LSTM modules by ones over packed weights.

    k is what the fullest block of a weight holds, so nothing but zeros is dropped. A weight that would not get smaller stays
    as it is (unstructured zeros, say); so do convolutions of several groups, and all other kinds of modules.

    Args:
        value_type: what the values are stored as; int8 with a scale a row.
        block: columns of a block; the pruning pattern's, or a multiple of it.
        vector: so many rows share their choice, where the pruning pattern was of that kind.

    Raises:
        PackingError: the model itself is a layer to replace, or is wrapped by torch.nn.utils.prune.
        BalancedFormatError: values that the value type cannot hold.
    """
    if value_type not in TORCH_DTYPES or not MIN_BLOCK <= block <= MAX_BLOCK or vector < 1:
        raise PackingError(
            f"values are one of {', '.join(TORCH_DTYPES)} in blocks of {MIN_BLOCK} to {MAX_BLOCK}, not {value_type} in {block}"
        )
    if isinstance(model, _LAYERS):
        raise PackingError("the layer itself cannot be replaced inside of itself: give the model that contains it")
    if prune.is_pruned(model):
        raise PackingError("masks are still attached: call torch.nn.utils.prune.remove on every pruned parameter first")
    total = sum(
        tensor.nbytes for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, torch.Tensor)
    )
    packer = _Packer(value_type, block, vector)
    tied = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
    made: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, _LAYERS) or any(id(p) in tied for p in module.parameters(recurse=False)):
            continue
        if id(module) not in made:
            made[id(module)] = packer.replacement(name, module)
        if made[id(module)] is not module:
            _replace(model, name, made[id(module)])
    return PackingReport(tuple(packer.layers), total - sum(layer.dense_bytes for layer in packer.layers))


def save_packed(model: nn.Module, path: str | Path) -> None:
    """Writes a packed model (or a dense one) to a safetensors file: whole or not at all, with digests of all tensors."""
    items: dict[str, BalancedWeight | torch.Tensor] = {}
    inside = []
    for name, module in model.named_modules():
        if isinstance(module, BalancedLinear):
            items[f"{name}.weight"] = module.weight
            inside += [f"{name}.{part}" for part in ("values", "index", "scales")]
    kept = set(model.state_dict())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in kept and name not in inside:
            items[name] = tensor.detach()
    balanced.save(path, items)


def load_packed(model: nn.Module, path: str | Path) -> nn.Module:
    """What ``save_packed`` wrote, into ``model``: the dense architecture, its layers replaced where the file has packed ones.

    Returns ``model``. Its weights need no values before.

    Raises:
        BalancedFormatError: no such file, or a broken or tampered one. PackingError: it is of another model.
    """
    items = balanced.load(path)
    packed = {name: item for name, item in items.items() if isinstance(item, BalancedWeight)}
    for name, module in list(model.named_modules()):
        if isinstance(module, _LAYERS):
            _put_packed(model, name, module, packed)
    if packed:
        raise PackingError(f"{path} is of another model: it has packed weights {', '.join(sorted(packed))[:200]}")
    dense = {name: item for name, item in items.items() if isinstance(item, torch.Tensor)}
    _copy_dense(model, dense, path)
    return model


class _Packer:
    def __init__(self, value_type: ValueType, block: int, vector: int):
        self.value_type, self.block, self.vector = value_type, block, vector
        self.layers: list[PackedLayer] = []

    def replacement(self, name: str, module: nn.Module) -> nn.Module:
        """The packed module, or ``module`` where its weights stay dense."""
        if isinstance(module, nn.LSTM):
            return self._lstm(name, module)
        if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            return module
        groups = 1 if isinstance(module, nn.Linear) else module.groups
        weight = self._pack(f"{name}.weight", module.weight, "its convolution has groups" if groups > 1 else "")
        if weight is None:
            return module
        linear = BalancedLinear(weight, module.bias)
        return linear if isinstance(module, nn.Linear) else BalancedConv(module, linear)

    def _lstm(self, name: str, lstm: nn.LSTM) -> nn.Module:
        matrices: dict[str, Matrix] = {}
        for matrix, (weight_name, bias_name) in lstm_names(lstm).items():
            dense = getattr(lstm, weight_name)
            bias = None if bias_name is None else getattr(lstm, bias_name)
            weight = self._pack(f"{name}.{weight_name}", dense)
            matrices[matrix] = _linear(dense, bias) if weight is None else BalancedLinear(weight, bias)
        if not any(isinstance(matrix, BalancedLinear) for matrix in matrices.values()):
            return lstm
        return BalancedLSTM(lstm, matrices)

    def _pack(self, name: str, parameter: torch.Tensor, why: str = "") -> BalancedWeight | None:
        matrix = as_matrix(parameter.detach())
        weight = None
        k = fullest_block(matrix, self.block, self.vector)
        if not why and k == self.block:
            why = f"a block of {self.block} columns has no zero"
        elif not why:
            weight = balanced.pack(
                matrix, max(k, 1), self.block, value_type=self.value_type, vector=self.vector, lossless=True
            )
            if weight.nbytes >= matrix.numel() * TORCH_DTYPES[self.value_type].itemsize:
                weight, why = None, f"{k} of {self.block} would not be smaller than dense {self.value_type}"
        self.layers.append(
            PackedLayer(
                name,
                matrix.shape[0],
                matrix.shape[1],
                0 if weight is None else weight.spec.k,
                self.block,
                parameter.nbytes,
                parameter.nbytes if weight is None else weight.nbytes,
                why,
            )
        )
        return weight


def fullest_block(matrix: torch.Tensor, block: int, vector: int = 1) -> int:
    """Non-zeros in the fullest block of a matrix [rows, columns]; for ``vector`` rows that share their choice, of their union."""
    used = F.pad(matrix != 0, (0, -matrix.shape[1] % block, 0, -matrix.shape[0] % vector))
    shared = used.view(-1, vector, used.shape[1]).any(dim=1)
    return int(shared.view(shared.shape[0], -1, block).sum(dim=2).max()) if matrix.numel() else 0


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    module.train(model.training)
    setattr(model.get_submodule(parent), last, module)


def _put_packed(model: nn.Module, name: str, module: nn.Module, packed: dict[str, BalancedWeight]) -> None:
    """Takes the module's weights out of ``packed`` and replaces it, if they are there."""
    if isinstance(module, nn.LSTM):
        matrices: dict[str, Matrix] = {}
        for matrix, (weight_name, bias_name) in lstm_names(module).items():
            dense, weight = getattr(module, weight_name), packed.pop(f"{name}.{matrix}.weight", None)
            bias = None if bias_name is None else getattr(module, bias_name)
            matrices[matrix] = _linear(dense, bias) if weight is None else _checked(name, weight, dense, bias)
        if any(isinstance(matrix, BalancedLinear) for matrix in matrices.values()):
            _replace(model, name, BalancedLSTM(module, matrices))
        return
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        return
    key = f"{name}.weight" if isinstance(module, nn.Linear) else f"{name}.linear.weight"
    weight = packed.pop(key, None)
    if weight is not None:
        linear = _checked(name, weight, module.weight, module.bias)
        _replace(model, name, linear if isinstance(module, nn.Linear) else BalancedConv(module, linear))


def _checked(name: str, weight: BalancedWeight, dense: torch.Tensor, bias: torch.Tensor | None) -> BalancedLinear:
    shape = as_matrix(dense.detach()).shape
    if (weight.rows, weight.columns) != tuple(shape):
        raise PackingError(f"{name} is {list(shape)} in the model and {weight.rows} x {weight.columns} in the file")
    return BalancedLinear(weight.to(dense.device), bias)


@torch.no_grad()
def _copy_dense(model: nn.Module, dense: Mapping[str, torch.Tensor], path: str | Path) -> None:
    inside = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, BalancedLinear)
        for part in ("values", "index", "scales")
    }
    kept = set(model.state_dict())
    own = {
        name: tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if name in kept and name not in inside
    }
    if set(own) != set(dense):
        raise PackingError(f"{path} is of another model: {', '.join(sorted(set(own) ^ set(dense)))[:200]} differ")
    for name, tensor in own.items():
        if tensor.shape != dense[name].shape:
            raise PackingError(f"{name} is {list(tensor.shape)} in the model and {list(dense[name].shape)} in {path}")
        tensor.copy_(dense[name])
