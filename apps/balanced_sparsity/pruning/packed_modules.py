"""Layers that compute with packed balanced weights: convolutions as im2col, and an LSTM that steps at batch 1."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from kernels.balanced import BalancedLinear

State = tuple[torch.Tensor, torch.Tensor]
Matrix = BalancedLinear | nn.Linear


class BalancedConv(nn.Module):
    """A Conv1d or Conv2d of one group over a packed weight [out, in x kernel]: patches are gathered (im2col) and multiplied.

    A 1 x 1 convolution of stride 1 gathers nothing.
    """

    def __init__(self, conv: nn.Conv1d | nn.Conv2d, linear: BalancedLinear):
        super().__init__()
        self.linear = linear
        self.flat = isinstance(conv, nn.Conv1d)
        self.kernel, self.stride, self.dilation = (self._two(s) for s in (conv.kernel_size, conv.stride, conv.dilation))
        self.padding = list(conv._reversed_padding_repeated_twice)
        self.padding_mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode

    def _two(self, sizes: tuple[int, ...]) -> tuple[int, int]:
        return (1, sizes[0]) if self.flat else (sizes[0], sizes[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, in, height, width] (Conv1d: [batch, in, length]; unbatched as well): as the convolution's own."""
        batched = x.dim() == (3 if self.flat else 4)
        x = x if batched else x.unsqueeze(0)
        if any(self.padding):
            x = F.pad(x, self.padding, mode=self.padding_mode)
        x = x.unsqueeze(2) if self.flat else x
        size = [
            (have - step * (kernel - 1) - 1) // stride + 1
            for have, kernel, stride, step in zip(x.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
        ]
        if self.kernel == (1, 1) and self.stride == (1, 1):
            patches = x.flatten(2)
        else:
            patches = F.unfold(x, self.kernel, self.dilation, 0, self.stride)
        y = self.linear(patches.transpose(1, 2)).transpose(1, 2).unflatten(2, size)
        y = y.squeeze(2) if self.flat else y
        return y if batched else y.squeeze(0)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}"


class BalancedLSTM(nn.Module):
    """An nn.LSTM over packed weights: the same arguments and results, and ``step`` for one frame at a time.

    Each layer's and direction's ``ih``, ``hh`` (and ``hr`` of a projection) is a ``BalancedLinear``, or a Linear where the weight
    was not pruned. Packed sequences are not taken. Dropout between layers is applied in training mode, as nn.LSTM's.
    """

    def __init__(self, lstm: nn.LSTM, matrices: dict[str, Matrix]):
        """``matrices``: by ``lstm_names``."""
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = lstm.input_size, lstm.hidden_size, lstm.num_layers
        self.batch_first, self.bidirectional, self.dropout = lstm.batch_first, lstm.bidirectional, lstm.dropout
        self.proj_size = lstm.proj_size
        for name, matrix in matrices.items():
            self.add_module(name, matrix)

    def forward(self, x: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        """As nn.LSTM: [T, B, in] ([B, T, in] if ``batch_first``, or unbatched [T, in]): outputs, and (h, c) [layers, B, ...].

        Raises TypeError for a packed sequence, ValueError for shapes that do not fit.
        """
        if not isinstance(x, torch.Tensor):
            raise TypeError("a BalancedLSTM takes padded sequences, not packed ones (nn.utils.rnn.pad_packed_sequence)")
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            raise ValueError(
                f"an input has {self.input_size} features at the end and 2 or 3 dimensions, not {list(x.shape)}"
            )
        batched = x.dim() == 3
        x_TBF = x.unsqueeze(1) if not batched else x.transpose(0, 1) if self.batch_first else x
        h, c = self._state(x_TBF, state, batched)
        last_h, last_c = [], []
        for layer in range(self.num_layers):
            outputs = []
            for way in range(self._ways):
                number = layer * self._ways + way
                sequence, (h_n, c_n) = self._direction(layer, way, x_TBF, (h[number], c[number]))
                outputs.append(sequence)
                last_h.append(h_n)
                last_c.append(c_n)
            x_TBF = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
            if self.dropout and self.training and layer + 1 < self.num_layers:
                x_TBF = F.dropout(x_TBF, self.dropout)
        h, c = torch.stack(last_h), torch.stack(last_c)
        if not batched:
            return x_TBF.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return x_TBF.transpose(0, 1) if self.batch_first else x_TBF, (h, c)

    def step(self, x_BF: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        """One frame [B, in]: the last layer's output [B, out] and the state (h, c) [layers, B, ...] after it.

        Raises ValueError for a bidirectional LSTM, which must hear the end first.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional LSTM cannot go step by step")
        h, c = self._state(x_BF.unsqueeze(0), state, True)
        hs, cs = [], []
        for layer in range(self.num_layers):
            x_BF, c_layer = self._cell(f"l{layer}", self.get_submodule(f"ih_l{layer}")(x_BF), h[layer], c[layer])
            hs.append(x_BF)
            cs.append(c_layer)
        return x_BF, (torch.stack(hs), torch.stack(cs))

    @property
    def _ways(self) -> int:
        return 2 if self.bidirectional else 1

    def _state(self, x_TBF: torch.Tensor, state: State | None, batched: bool) -> State:
        count, batch = self.num_layers * self._ways, x_TBF.shape[1]
        width = self.proj_size or self.hidden_size
        if state is None:
            return x_TBF.new_zeros(count, batch, width), x_TBF.new_zeros(count, batch, self.hidden_size)
        h, c = state if batched else (part.unsqueeze(1) for part in state)
        if tuple(h.shape) != (count, batch, width) or tuple(c.shape) != (count, batch, self.hidden_size):
            raise ValueError(
                f"the state must be [{count}, {batch}, {width}] and [{count}, {batch}, {self.hidden_size}], "
                f"not {list(h.shape)} and {list(c.shape)}"
            )
        return h, c

    def _direction(self, layer: int, way: int, x_TBF: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        suffix = f"l{layer}" + ("_reverse" if way else "")
        gates_TBG = self.get_submodule(f"ih_{suffix}")(x_TBF)
        h, c = state
        outputs: list[torch.Tensor] = []
        for gates_BG in reversed(gates_TBG.unbind(0)) if way else gates_TBG.unbind(0):
            h, c = self._cell(suffix, gates_BG, h, c)
            outputs.append(h)
        ordered = outputs[::-1] if way else outputs
        sequence = torch.stack(ordered) if ordered else x_TBF.new_zeros(0, x_TBF.shape[1], h.shape[1])
        return sequence, (h, c)

    def _cell(self, suffix: str, input_gates: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> State:
        """(output, cell) after one frame; gates are input, forget, cell, output (torch.nn.LSTM's order)."""
        i, f, g, o = (input_gates + self.get_submodule(f"hh_{suffix}")(h)).chunk(4, dim=1)
        c = torch.addcmul(i.sigmoid() * g.tanh(), f.sigmoid(), c)
        h = o.sigmoid() * c.tanh()
        return (self.get_submodule(f"hr_{suffix}")(h) if self.proj_size else h), c

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, layers={self.num_layers}, bidirectional={self.bidirectional}"


def lstm_names(lstm: nn.LSTM) -> dict[str, tuple[str, str | None]]:
    """Matrix name in a BalancedLSTM -> (weight, bias) of the nn.LSTM; the bias is None where it has none."""
    names: dict[str, tuple[str, str | None]] = {}
    for layer in range(lstm.num_layers):
        for way in ("", "_reverse") if lstm.bidirectional else ("",):
            for kind in ("ih", "hh", "hr") if lstm.proj_size else ("ih", "hh"):
                bias = f"bias_{kind}_l{layer}{way}" if lstm.bias and kind != "hr" else None
                names[f"{kind}_l{layer}{way}"] = (f"weight_{kind}_l{layer}{way}", bias)
    return names
