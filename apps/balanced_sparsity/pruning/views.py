"""Which weights of a model can be pruned, and how each is a matrix [rows, columns]: a row per output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

_RECURRENT = ("weight_ih_l", "weight_hh_l")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True, eq=False)
class PrunableWeight:
    """One weight of one module.

    ``name``: of the parameter in the model (``lstm.weight_hh_l0``). Its matrix: Linear as it is, [out, in]; Conv1d and Conv2d
    [out, in / groups x kernel] in the order of ``torch.nn.functional.unfold`` (a 1 x 1 convolution is a linear layer); LSTM, GRU
    and RNN [gates x hidden, in] of each layer and direction.
    """

    name: str
    module: nn.Module
    parameter_name: str

    @property
    def parameter(self) -> torch.Tensor:
        """The weight as the module has it now."""
        return getattr(self.module, self.parameter_name)

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.parameter.shape[0]

    @property
    def columns(self) -> int:
        """Inputs of one output."""
        return self.parameter[0].numel()

    def matrix(self) -> torch.Tensor:
        """[rows, columns], detached; shares memory with a contiguous weight."""
        return as_matrix(self.parameter.detach())

    def shaped(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix [rows, columns] (values, mask) in the shape of the weight."""
        return matrix.reshape(self.parameter.shape)

    @torch.no_grad()
    def write(self, matrix: torch.Tensor) -> None:
        """Overwrite the weight, in place."""
        self.parameter.copy_(self.shaped(matrix))


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """[rows, columns] of a weight [out, ...]. ValueError for a vector."""
    if weight.dim() < 2:
        raise ValueError(f"a weight to prune has at least two dimensions, not {tuple(weight.shape)}")
    return weight.flatten(1)


def prunable(model: nn.Module, skip: Sequence[str] = ()) -> list[PrunableWeight]:
    """The weights of Linear, Conv1d, Conv2d, LSTM, GRU and RNN modules, in the order of ``named_modules``.

    Embeddings stay dense, and so does a linear layer that is tied to one; a weight that several modules share is listed once.

    Args:
        skip: names of modules or parameters that stay dense, with all that is in them. ValueError: it is not there.
    """
    known = {name for name, _ in model.named_modules()} | {
        name for name, _ in model.named_parameters(remove_duplicate=False)
    }
    unknown = [name for name in skip if name not in known]
    if unknown:
        raise ValueError(
            f"the model has no {', '.join(unknown)} to skip; its parts are {', '.join(sorted(known - {''})[:20])}"
        )
    seen = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
    found = []
    for name, module in model.named_modules():
        for parameter_name in _weights_of(module):
            full = f"{name}.{parameter_name}" if name else parameter_name
            if any(full == part or full.startswith(f"{part}.") for part in skip):
                continue
            weight = PrunableWeight(full, module, parameter_name)
            if id(weight.parameter) not in seen:
                seen.add(id(weight.parameter))
                found.append(weight)
    return found


def _weights_of(module: nn.Module) -> list[str]:
    if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
        return ["weight"]
    if isinstance(module, nn.RNNBase):
        return [name for names in module._all_weights for name in names if name.startswith(_RECURRENT)]
    return []
