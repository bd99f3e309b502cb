"""Self-attention that can hand out what guidance needs: rotated q and k of the guided heads (rows), or their scores (maps).

Shapes: B rows of S positions, H heads of D dimensions, G guided heads of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from apps.mcmisp.model.config import EncoderSpec

Backend = Literal["rows", "maps"]


@dataclass(frozen=True)
class Captured:
    """What a guided layer hands out. ``rows``: q_BGSD, k_BGSD as the scores were made of; ``maps``: scores_BGSS (masked pairs:

    any value, the reader masks again). Scores are scaled, before the softmax.
    """

    layer: int
    q_BGSD: torch.Tensor | None = None
    k_BGSD: torch.Tensor | None = None
    scores_BGSS: torch.Tensor | None = None
    scale: float = 1.0


class RotaryTable(nn.Module):
    """cos and sin [positions, D / 2] of rotary embeddings (Su et al. 2021); relative, so packed rows need no restart."""

    def __init__(self, head_dim: int, positions: int, base: float):
        super().__init__()
        frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, x_BHSD: torch.Tensor) -> torch.Tensor:
        size = x_BHSD.shape[-2]
        cos, sin = self.cos[:size].to(x_BHSD.dtype), self.sin[:size].to(x_BHSD.dtype)
        low, high = x_BHSD.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class SelfAttention(nn.Module):
    """Bidirectional multi-head attention within documents; ``guided`` names heads whose attention is handed out."""

    def __init__(self, spec: EncoderSpec, layer: int):
        super().__init__()
        self.layer, self.heads, self.head_dim, self.dropout = layer, spec.heads, spec.head_dim, spec.dropout
        self.scale = spec.head_dim**-0.5
        self.qkv = nn.Linear(spec.width, 3 * spec.width, bias=spec.bias)
        self.out = nn.Linear(spec.width, spec.width, bias=spec.bias)
        # One gain a dimension (Henry et al. 2020, query-key normalisation).
        self.q_gain = nn.Parameter(torch.ones(spec.head_dim)) if spec.qk_norm else None
        self.k_gain = nn.Parameter(torch.ones(spec.head_dim)) if spec.qk_norm else None
        self.eps = spec.norm_eps

    def forward(
        self,
        x_BSE: torch.Tensor,
        mask_B1SS: torch.Tensor | None,
        rotary: RotaryTable | None,
        guided: Sequence[int] = (),
        backend: Backend = "rows",
        ablated: Sequence[int] = (),
    ) -> tuple[torch.Tensor, Captured | None]:
        """``mask_B1SS``: True where a query may see a key; ``ablated`` heads contribute nothing."""
        batch, size, width = x_BSE.shape
        qkv = self.qkv(x_BSE).view(batch, size, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.q_gain is not None and self.k_gain is not None:
            q, k = _rms_norm(q, self.q_gain, self.eps), _rms_norm(k, self.k_gain, self.eps)
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        captured: Captured | None = None
        dropout = self.dropout if self.training else 0.0
        if guided and backend == "maps":
            scores = (q * self.scale) @ k.transpose(-2, -1)
            captured = Captured(self.layer, scores_BGSS=_heads(scores, guided))
            if mask_B1SS is not None:
                scores = scores.masked_fill(~mask_B1SS, float("-inf"))
            weights = functional.dropout(scores.softmax(-1, dtype=torch.float32).to(v.dtype), dropout, self.training)
            mixed = weights @ v
        else:
            if guided:
                captured = Captured(self.layer, _heads(q, guided), _heads(k, guided), scale=self.scale)
            mixed = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask_B1SS, dropout_p=dropout, scale=self.scale
            )
        if ablated:
            kept = torch.ones(self.heads, dtype=mixed.dtype, device=mixed.device)
            kept[list(ablated)] = 0
            mixed = mixed * kept[None, :, None, None]
        return self.out(mixed.transpose(1, 2).reshape(batch, size, width)), captured


def _rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, statistics in float32, result in ``x``'s dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain).to(x.dtype)


def _heads(x_BHXX: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """The chosen heads; a view where they are neighbours, so that nothing is copied."""
    first = heads[0]
    if list(heads) == list(range(first, first + len(heads))):
        return x_BHXX[:, first : first + len(heads)]
    return x_BHXX[:, list(heads)]


__all__ = ["Backend", "Captured", "RotaryTable", "SelfAttention"]
