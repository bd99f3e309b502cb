"""Sequences with contiguous keys and values and the block pool that holds the same, for the tests of paged attention.

The oracle is torch's own SDPA in float64 over the contiguous tensors: it shares no code and no layout with what it checks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

BLOCK = 16


class World:
    """Sequences of ``lengths`` positions; block ids are drawn at random, pool slots nobody owns hold ``garbage``."""

    def __init__(
        self,
        lengths: Sequence[int],
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        garbage: float = 0.0,
        layers: int = 2,
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.lengths, self.heads, self.kv_heads, self.head_dim, self.dtype = (
            list(lengths),
            heads,
            kv_heads,
            head_dim,
            dtype,
        )
        self.scale = head_dim**-0.5
        draw = lambda n, h: torch.randn(n, h, head_dim, generator=self.generator)  # noqa: E731
        self.q = [2 * draw(n, heads) for n in lengths]
        self.k = [draw(n, kv_heads) for n in lengths]
        self.v = [draw(n, kv_heads) for n in lengths]
        blocks = [-(-n // BLOCK) for n in lengths]
        total = sum(blocks) + 3
        pool = torch.full((total, layers, 2, kv_heads, head_dim * BLOCK), garbage, dtype=dtype)
        self.kv = pool[:, layers - 1]
        self.table = torch.zeros(len(self.lengths), max(blocks, default=0) + 1, dtype=torch.int32)
        self.permute_blocks(seed)
        self.fill()

    def permute_blocks(self, seed: int) -> None:
        order = torch.randperm(self.kv.shape[0], generator=torch.Generator().manual_seed(seed)).int()
        used = 0
        for s, n in enumerate(self.lengths):
            count = -(-n // BLOCK)
            self.table[s, :count] = order[used : used + count]
            used += count

    def fill(self) -> None:
        """Write every key and value by the definition of the layout, one element at a time in effect."""
        for s, n in enumerate(self.lengths):
            for p in range(n):
                block = self.kv[self.table[s, p // BLOCK].item()]
                block[0].view(self.kv_heads, self.head_dim, BLOCK)[:, :, p % BLOCK] = self.k[s][p].to(self.dtype)
                block[1].view(self.kv_heads, BLOCK, self.head_dim)[:, p % BLOCK] = self.v[s][p].to(self.dtype)

    def batch(self, chunks: Sequence[tuple[int, int, int]]) -> tuple[torch.Tensor, ...]:
        """(q, kv, block_table, query_start, context_len) for query positions begin ... end - 1 of the given sequences."""
        q = torch.cat([self.q[s][begin:end] for s, begin, end in chunks])
        start = torch.tensor([0, *torch.tensor([end - begin for _, begin, end in chunks]).cumsum(0)], dtype=torch.int32)
        context = torch.tensor([end for _, _, end in chunks], dtype=torch.int32)
        return q, self.kv, self.table[[s for s, _, _ in chunks]].contiguous(), start, context

    def expected(self, chunks: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """The same by SDPA in float64."""
        out = []
        for s, begin, end in chunks:
            group = self.heads // self.kv_heads
            k, v = (
                x[s][:end].to(self.dtype).double().transpose(0, 1).repeat_interleave(group, 0) for x in (self.k, self.v)
            )
            mask = torch.arange(end)[None, :] <= torch.arange(begin, end)[:, None]
            q = self.q[s][begin:end].double().transpose(0, 1)
            out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale).transpose(0, 1))
        return torch.cat(out)
