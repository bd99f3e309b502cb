"""Paged attention against torch's SDPA on contiguous keys and values: one layer of a decode step, for benchmarks.llumnix_engine.

The rival gets what it likes best: no paging, no gather, and the better of its two ways to share KV heads among query heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from actors.llumnix.engine.model_config import ModelConfig
from benchmarks.harness import Samples, alternate
from kernels.paged_attention import BLOCK_SIZE, paged_attention

CYCLE_BYTES = 64 << 20
"""Layers are cycled through until their KV is this much, so that it comes from memory as in a real step, not from the cache."""


def compare_attention(config: ModelConfig, batch: int, context: int, rounds: int) -> Samples:
    """Milliseconds per layer of ``paged`` and of ``sdpa``, fp32, the same keys and values. ValueError if results differ."""
    c = config
    layer_bytes = 2 * batch * context * c.kv_size * 4
    layers = max(2, min(c.num_layers, -(-CYCLE_BYTES // layer_bytes)))
    per_seq = -(-context // BLOCK_SIZE)
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(layers, batch, c.num_kv_heads, context, c.head_dim, generator=generator)
    v = torch.randn(layers, batch, c.num_kv_heads, context, c.head_dim, generator=generator)
    q = torch.randn(batch, c.num_heads, c.head_dim, generator=generator)
    # Blocks in random order, as a pool looks after some hours.
    order = torch.randperm(batch * per_seq, generator=generator).to(torch.int32)
    table = order.view(batch, per_seq)
    kv = torch.zeros(batch * per_seq, layers, 2, c.num_kv_heads, c.head_dim * BLOCK_SIZE)
    blocked = (layers, batch, c.num_kv_heads, per_seq, BLOCK_SIZE, c.head_dim)
    spare = per_seq * BLOCK_SIZE - context
    for index, x in enumerate((k, v)):
        blocks = F.pad(x, (0, 0, 0, spare)).view(blocked)
        blocks = blocks.transpose(-1, -2) if index == 0 else blocks
        rows = blocks.permute(1, 3, 0, 2, 4, 5).reshape(batch * per_seq, layers, c.num_kv_heads, -1)
        kv[order.long(), :, index] = rows
    query_start = torch.arange(batch + 1, dtype=torch.int32)
    lengths = torch.full((batch,), context, dtype=torch.int32)
    group = c.num_heads // c.num_kv_heads
    rows_q = q.unsqueeze(2)  # [B, heads, 1, D]
    grouped_q = q.view(batch, c.num_kv_heads, group, c.head_dim)  # Query heads of a KV head as its query positions.

    def paged() -> torch.Tensor:
        for layer in range(layers):
            out = paged_attention(q, kv[:, layer], table, query_start, lengths, c.head_dim**-0.5)
        return out

    def sdpa_gqa() -> torch.Tensor:
        for layer in range(layers):
            out = F.scaled_dot_product_attention(rows_q, k[layer], v[layer], enable_gqa=group > 1)
        return out.squeeze(2)

    def sdpa_grouped() -> torch.Tensor:
        """No mask is needed in decode, so the group may stand where query positions stand: each K and V is read once."""
        for layer in range(layers):
            out = F.scaled_dot_product_attention(grouped_q, k[layer], v[layer])
        return out.flatten(1, 2)

    for rival in (sdpa_gqa, sdpa_grouped):
        expected = rival().reshape(batch, c.num_heads, c.head_dim)
        if not torch.allclose(paged(), expected, rtol=1e-3, atol=1e-4):
            raise ValueError("paged attention and SDPA disagree")
    calls = max(1, round(2e7 / (layers * batch * context * c.kv_size)))
    arms: dict[str, Callable[[], Any]] = {"paged": paged, "gqa": sdpa_gqa, "grouped": sdpa_grouped}
    samples = alternate(arms, rounds, warmup=2, calls=calls)
    best = min(("gqa", "grouped"), key=samples.median)
    per_layer = {
        arm: tuple(1e3 * t / layers for t in samples.values[source])
        for arm, source in (("paged", "paged"), ("sdpa", best))
    }
    return Samples(per_layer)
