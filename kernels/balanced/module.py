"""``BalancedLinear``: a linear layer over a packed weight, in the state dict, with values that may be trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from kernels.balanced.format import BalancedWeight, layout_of, pack
from kernels.balanced.linear import balanced_linear
from kernels.balanced.spec import TORCH_DTYPES, BalancedFormatError, BalancedSpec, ValueType


class BalancedLinear(nn.Module):
    """``y = x W^T + bias`` with a balanced W; the state dict holds ``values``, ``index``, ``scales`` and what they mean.

    A state dict of another pattern, value type or layout but the same features may be loaded.
    """

    values: torch.Tensor
    index: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: BalancedWeight, bias: torch.Tensor | None = None, *, trainable: bool = False):
        """``trainable``: values are a parameter (float value types only); the choice of columns never changes."""
        super().__init__()
        if trainable and weight.spec.value_type == "int8":
            raise BalancedFormatError("int8 values cannot be trained; pack float values")
        self.in_features, self.out_features, self.trainable = weight.columns, weight.rows, trainable
        self._take(weight)
        if bias is not None and tuple(bias.shape) != (weight.rows,):
            raise BalancedFormatError(f"bias must be [{weight.rows}], got {list(bias.shape)}")
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=trainable)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        k: int,
        block: int,
        *,
        value_type: ValueType = "fp32",
        vector: int = 1,
        mask: torch.Tensor | None = None,
        trainable: bool = False,
    ) -> BalancedLinear:
        """Pack a dense layer: by magnitude, or by the ``mask`` that pruning made."""
        weight = pack(linear.weight, k, block, value_type=value_type, vector=vector, mask=mask)
        return cls(weight, linear.bias, trainable=trainable)

    @property
    def weight(self) -> BalancedWeight:
        """The packed weight; it shares its tensors with this layer."""
        return self._weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., in_features]: [..., out_features]."""
        return balanced_linear(x, self._weight, self.bias)

    def extra_repr(self) -> str:
        spec = self._weight.spec
        return f"{self.in_features} -> {self.out_features}, {spec.k}:{spec.block} {spec.value_type}, {spec.index_kind}"

    def get_extra_state(self) -> dict[str, Any]:
        """What the buffers mean: the fields of the spec."""
        return asdict(self._weight.spec)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Taken in by ``_load_from_state_dict``, before the tensors are copied."""

    def _take(self, weight: BalancedWeight) -> None:
        if self.trainable:
            self.values = nn.Parameter(weight.values.detach())
        else:
            self.register_buffer("values", weight.values.detach())
        self.register_buffer("index", weight.index)
        self.register_buffer("scales", weight.scales)
        self._join(weight.spec)

    def _join(self, spec: BalancedSpec) -> None:
        self._weight = BalancedWeight(spec, self.values, self.index, self.scales)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> BalancedLinear:
        was_on = self.values.device.type
        super()._apply(fn, recurse)
        spec = self._weight.spec
        self.scales = self.scales.float()  # whatever the values are converted to
        if self.values.dtype != TORCH_DTYPES[spec.value_type]:
            names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
            if self.values.dtype not in names:
                raise BalancedFormatError(
                    f"values cannot be {self.values.dtype}; they are one of {', '.join(TORCH_DTYPES)}"
                )
            spec = replace(spec, value_type=names[self.values.dtype])
        self._join(spec)
        now_on = self.values.device.type
        # What an optimiser holds keeps its shape; the kernels then convert for themselves.
        if now_on != was_on and {now_on, was_on} == {"cpu", "cuda"} and not self.trainable:
            self._take(self._weight.to_layout(layout_of(now_on)))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        fields = state_dict.get(f"{prefix}_extra_state")
        if fields is not None:
            try:
                spec = BalancedSpec(**fields)
            except TypeError as error:
                raise BalancedFormatError(
                    f"{prefix}_extra_state does not describe a balanced weight: {error}"
                ) from error
            if (spec.rows, spec.columns) != (self.out_features, self.in_features):
                raise BalancedFormatError(
                    f"{prefix[:-1] or 'the layer'} is {self.in_features} -> {self.out_features}, "
                    f"the state dict's {spec.columns} -> {spec.rows}"
                )
            if spec != self._weight.spec:
                device = self.values.device
                shapes = ((spec.values_shape, TORCH_DTYPES[spec.value_type]), (spec.index_shape, spec.index_dtype))
                values, index = (torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes)
                self._take(BalancedWeight(spec, values, index, torch.empty(spec.scales_count, device=device)))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._join(self._weight.spec)
        self._weight.validate()
