"""A small world for guided attention: random q, k, documents, wanted rows and a table, and the divergence in loops of float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kernels.guided_attention import Mixture, Rows, TableView


@dataclass
class World:
    q: torch.Tensor
    k: torch.Tensor
    wanted: torch.Tensor
    kept: torch.Tensor
    document: torch.Tensor
    ids: torch.Tensor
    table: TableView
    wrong: torch.Tensor
    gold: torch.Tensor
    scale: float

    @property
    def rows(self) -> Rows:
        return Rows.at(self.wanted)

    def mixture(self, contrast: bool) -> Mixture:
        return Mixture(self.wrong, -0.5, self.gold, 0.5) if contrast else Mixture(self.wrong, -0.5)

    def arguments(self, contrast: bool = False) -> tuple:
        return (
            self.q, self.k, self.rows, self.kept, self.document, self.ids, self.table, self.mixture(contrast), self.scale
        )  # fmt: skip

    def expected(self, contrast: bool, renormalise: bool) -> torch.Tensor:
        """KL of each row and head, from the definition, in loops."""
        rows, heads = self.rows, self.q.shape[1]
        found = torch.zeros(len(rows), heads, dtype=torch.float64)
        scores = self.table.table_VV.double() * self.table.step
        for e, (b, i) in enumerate(zip(rows.sequence_E.tolist(), rows.position_E.tolist(), strict=True)):
            document = [j for j in range(self.ids.shape[1]) if self.document[b, j] == self.document[b, i]]
            keys = [j for j in document if self.kept[b, j] and j != i]
            if not keys:
                continue
            goal = [-0.5 * scores[self.wrong[e], self.ids[b, j]].item() for j in keys]
            if contrast:
                goal = [g + 0.5 * scores[self.gold[e], self.ids[b, j]].item() for g, j in zip(goal, keys, strict=True)]
            total = sum(math.exp(g) for g in goal)
            for h in range(heads):
                a = {j: self.scale * float(self.q[b, h, i].double() @ self.k[b, h, j].double()) for j in document}
                all_a = sum(math.exp(a[j]) for j in (keys if renormalise else document))
                for g, j in zip(goal, keys, strict=True):
                    p = math.exp(g) / total
                    found[e, h] += p * (math.log(p) - math.log(math.exp(a[j]) / all_a))
        return found


def world(batch: int = 3, heads: int = 2, size: int = 70, dim: int = 16, vocab: int = 50, share: float = 0.2) -> World:
    """Sequence 0 has a row whose document holds nothing else that is kept; the last sequence has no wanted rows."""
    g = torch.Generator().manual_seed(3)
    q, k = (torch.randn(batch, heads, size, dim, generator=g) for _ in range(2))
    document = (torch.arange(size) >= size // 3).long().repeat(batch, 1)
    document[0, :2] = 7
    wanted = torch.rand(batch, size, generator=g) < share
    wanted[0, 0], wanted[0, 1], wanted[1, 5] = True, False, True
    wanted[-1] = False
    kept = ~wanted & (torch.rand(batch, size, generator=g) < 0.8)
    kept[0, 1] = False
    kept[1, 5] = True  # wanted and kept, as ELECTRA's replaced tokens are: a row never speaks of itself
    ids = torch.randint(0, vocab, (batch, size), generator=g)
    table = torch.randint(-127, 128, (vocab, vocab), generator=g).to(torch.int8)
    table = torch.minimum(table, table.T).contiguous()
    count = int(wanted.sum())
    wrong, gold = (torch.randint(0, vocab, (count,), generator=g) for _ in range(2))
    return World(q, k, wanted, kept, document, ids, TableView(table, 0.05), wrong, gold, dim**-0.5)
