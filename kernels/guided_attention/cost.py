"""What the back ends cost in operations and memory for a layer: the figures that decide which to use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionCost:
    """Multiplications and additions of the forward score products (backward: twice that), bytes of scores kept for backward."""

    maps_flops: int
    rows_flops: int
    maps_bytes: int
    rows_bytes: int
    fused_bytes: int

    @property
    def flops_fraction(self) -> float:
        return self.rows_flops / self.maps_flops

    @property
    def memory_fraction(self) -> float:
        return self.rows_bytes / self.maps_bytes


def attention_cost(
    batch: int,
    size: int,
    heads: int,
    guided_heads: int,
    head_dim: int,
    rows_per_sequence: Sequence[int],
    element_bytes: int = 4,
) -> AttentionCost:
    """``maps``: scores of all heads [B, H, S, S]. ``rows``: [B, G, R, S] with R the most rows of a sequence (padding included).

    ``fused``: three numbers a row and head (the divergence and two logsumexps).
    """
    longest = max(rows_per_sequence, default=0)
    maps, rows = batch * heads * size * size, batch * guided_heads * longest * size
    return AttentionCost(
        maps_flops=2 * maps * head_dim,
        rows_flops=2 * rows * head_dim,
        maps_bytes=maps * element_bytes,
        rows_bytes=rows * element_bytes,
        fused_bytes=sum(rows_per_sequence) * guided_heads * 3 * 4,
    )
