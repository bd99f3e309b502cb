"""The encoder: token embeddings, layers of attention and feed-forward, pre-norm or post-norm, one class for both families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

from apps.mcmisp.model.attention import Backend, Captured, RotaryTable, SelfAttention
from apps.mcmisp.model.config import EncoderSpec

HeadsByLayer = Mapping[int, Sequence[int]]
"""Layer -> its heads."""


class FeedForward(nn.Module):
    """GELU(x W1) W2, or with a gate (GELU(x Wg) * x W1) W2 (Shazeer 2020, GeGLU)."""

    def __init__(self, spec: EncoderSpec):
        super().__init__()
        self.gated = spec.gated
        self.up = nn.Linear(spec.width, (2 if spec.gated else 1) * spec.ffn, bias=spec.bias)
        self.down = nn.Linear(spec.ffn, spec.width, bias=spec.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            return self.down(functional.gelu(gate) * value)
        return self.down(functional.gelu(hidden))


class Layer(nn.Module):
    """Attention and feed-forward around a residual stream, normalised before each (modern) or after each (classic)."""

    def __init__(self, spec: EncoderSpec, index: int):
        super().__init__()
        self.pre_norm = spec.pre_norm
        self.attention = SelfAttention(spec, index)
        self.attention_norm = nn.LayerNorm(spec.width, eps=spec.norm_eps, bias=spec.bias)
        self.feed_forward = FeedForward(spec)
        self.feed_forward_norm = nn.LayerNorm(spec.width, eps=spec.norm_eps, bias=spec.bias)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        rotary: RotaryTable | None,
        guided: Sequence[int],
        backend: Backend,
        ablated: Sequence[int],
    ) -> tuple[torch.Tensor, Captured | None]:
        inside = self.attention_norm(x) if self.pre_norm else x
        mixed, captured = self.attention(inside, mask, rotary, guided, backend, ablated)
        x = x + self.dropout(mixed)
        if self.pre_norm:
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), captured
        x = self.attention_norm(x)
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x))), captured


class Encoder(nn.Module):
    """ids_BS -> hidden_BSE. ``document_BS`` numbers the documents packed into a row; attention stays within each."""

    def __init__(self, spec: EncoderSpec):
        super().__init__()
        self.spec = spec
        self.tokens = nn.Embedding(spec.vocab_size, spec.embedding_width)
        self.project = (
            None if spec.embedding_width == spec.width else nn.Linear(spec.embedding_width, spec.width, bias=spec.bias)
        )
        self.positions = None if spec.rotary else nn.Embedding(spec.max_positions, spec.embedding_width)
        self.rotary = RotaryTable(spec.head_dim, spec.max_positions, spec.rotary_base) if spec.rotary else None
        self.embedding_norm = nn.LayerNorm(spec.embedding_width, eps=spec.norm_eps, bias=spec.bias)
        self.layers = nn.ModuleList(Layer(spec, index) for index in range(spec.layers))
        self.final_norm = nn.LayerNorm(spec.width, eps=spec.norm_eps, bias=spec.bias) if spec.pre_norm else None
        self.dropout = nn.Dropout(spec.dropout)
        self.apply(_initialise)
        for layer in self.layers:
            # The residual stream's variance is kept as depth grows (Radford et al. 2019, section 2.3).
            for last in (layer.attention.out, layer.feed_forward.down) if spec.pre_norm else ():
                nn.init.normal_(last.weight, std=0.02 / (2 * spec.layers) ** 0.5)

    def forward(
        self,
        ids_BS: torch.Tensor,
        document_BS: torch.Tensor | None = None,
        *,
        guided: HeadsByLayer | None = None,
        backend: Backend = "rows",
        ablated: HeadsByLayer | None = None,
    ) -> tuple[torch.Tensor, list[Captured]]:
        """The last hidden states, and what the ``guided`` heads of each layer saw, in the order of the layers.

        Raises:
            ValueError: the rows are longer than ``max_positions``.
        """
        size = ids_BS.shape[1]
        if size > self.spec.max_positions:
            raise ValueError(f"rows of {size} tokens are longer than model.max_positions {self.spec.max_positions}")
        x = self.tokens(ids_BS)
        if self.positions is not None:
            x = x + self.positions(positions_in_documents(ids_BS, document_BS))
        x = self.dropout(self.embedding_norm(x))
        if self.project is not None:
            x = self.project(x)
        mask = document_mask(document_BS)
        captures: list[Captured] = []
        for index, layer in enumerate(self.layers):
            x, captured = layer(
                x, mask, self.rotary, (guided or {}).get(index, ()), backend, (ablated or {}).get(index, ())
            )
            if captured is not None:
                captures.append(captured)
        return (x if self.final_norm is None else self.final_norm(x)), captures


def document_mask(document_BS: torch.Tensor | None) -> torch.Tensor | None:
    """True [B, 1, S, S] where query and key are of one document; None where every row is a single one (the fast case)."""
    if document_BS is None or bool((document_BS == document_BS[:, :1]).all()):
        return None
    return (document_BS[:, :, None] == document_BS[:, None, :])[:, None]


def positions_in_documents(ids_BS: torch.Tensor, document_BS: torch.Tensor | None) -> torch.Tensor:
    """[B, S] (or [1, S]): 0, 1, ... beginning anew with each document of a row."""
    place = torch.arange(ids_BS.shape[1], device=ids_BS.device)[None]
    if document_BS is None:
        return place
    starts = torch.ones_like(document_BS, dtype=torch.bool)
    starts[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    return place - torch.where(starts, place, 0).cummax(dim=1).values


def _initialise(module: nn.Module) -> None:
    """BERT's: normal with deviation 0.02, biases zero."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


__all__ = ["Captured", "Encoder", "HeadsByLayer", "document_mask", "positions_in_documents"]
