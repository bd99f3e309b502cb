"""The simulated job's shape: ranks in data, tensor, pipeline and expert parallel groups, nodes, and the order of a step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from actors.c4.diagnosis.observation import Group

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Shape:
    """Rank = (stage * data + d) * tensor + t, as Megatron numbers them: tensor groups lie inside nodes."""

    data: int = 16
    tensor: int = 8
    pipeline: int = 8
    expert: int = 1
    """Data-parallel ranks that share the experts of a layer; 1 for a dense model. Divides ``data``."""
    micro_batches: int = 8
    layers: int = 2
    """Tensor-parallel all-reduces in a forward (and in a backward) pass of a stage."""
    buckets: int = 4
    """Data-parallel all-reduces at the end of a step."""

    def __post_init__(self) -> None:
        if self.data % self.expert:
            raise ValueError(f"expert={self.expert} does not divide data={self.data}.")
        if self.ranks % GPUS_PER_NODE:
            raise ValueError(f"{self.ranks} ranks do not fill nodes of {GPUS_PER_NODE}.")
        for name, count in (("micro_batches", self.micro_batches), ("buckets", self.buckets)):
            if count % 4:
                raise ValueError(
                    f"{name}={count} must be a multiple of 4: then a block of four operations ends with a step."
                )

    @property
    def ranks(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def nodes(self) -> int:
        return self.ranks // GPUS_PER_NODE

    @cached_property
    def rank_of(self) -> NDArray[np.int32]:
        """[P, D, T]"""
        return np.arange(self.ranks, dtype=np.int32).reshape(self.pipeline, self.data, self.tensor)

    def place(self, rank: int) -> tuple[int, int, int]:
        """(stage, data, tensor) of a rank."""
        stage, rest = divmod(rank, self.data * self.tensor)
        return stage, *divmod(rest, self.tensor)

    @cached_property
    def order(self) -> tuple[tuple[tuple[int, bool, int], ...], ...]:
        """Waves of (stage, backward, micro-batch) that can run side by side; each stage in its 1F1B order.

        Source: PipeDream-Flush / Megatron-LM (Narayanan et al. 2021, figure 4): warm-up forwards, then one forward one backward.
        """
        todo: list[list[tuple[bool, int]]] = []
        for stage in range(self.pipeline):
            warm = min(self.micro_batches, self.pipeline - 1 - stage)
            turns = [(False, m) for m in range(warm)]
            for m in range(self.micro_batches - warm):
                turns += [(False, warm + m), (True, m)]
            todo.append(turns + [(True, m) for m in range(self.micro_batches - warm, self.micro_batches)])
        done: set[tuple[int, bool, int]] = set()
        waves = []
        while any(todo):
            wave = []
            for stage, turns in enumerate(todo):
                if not turns:
                    continue
                backward, m = turns[0]
                source = stage + 1 if backward else stage - 1
                if not 0 <= source < self.pipeline or (source, backward, m) in done:
                    wave.append((stage, backward, m))
            for stage, backward, m in wave:
                todo[stage].pop(0)
                done.add((stage, backward, m))
            waves.append(tuple(wave))
        return tuple(waves)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All communicators: tp, dp, ep, and one for each direction between neighbouring stages' ranks."""
        ranks = self.rank_of
        found = []
        if self.tensor > 1:
            found += [
                Group(f"tp{p}.{d}", "tp", tuple(ranks[p, d].tolist()))
                for p in range(self.pipeline)
                for d in range(self.data)
            ]
        if self.data > 1:
            found += [
                Group(f"dp{p}.{t}", "dp", tuple(ranks[p, :, t].tolist()))
                for p in range(self.pipeline)
                for t in range(self.tensor)
            ]
        if self.expert > 1:
            found += [
                Group(f"ep{p}.{e}.{t}", "ep", tuple(ranks[p, e * self.expert : (e + 1) * self.expert, t].tolist()))
                for p in range(self.pipeline) for e in range(self.data // self.expert) for t in range(self.tensor)
            ]  # fmt: skip
        for p in range(self.pipeline - 1):
            for a, b in zip(ranks[p].ravel().tolist(), ranks[p + 1].ravel().tolist(), strict=True):
                found += [Group(f"pp/{a}->{b}", "pp", (a, b)), Group(f"pp/{b}->{a}", "pp", (b, a))]
        return tuple(found)

    @cached_property
    def group_index(self) -> dict[str, NDArray[np.int32]]:
        """Index into ``groups`` by role: tp [P, D], dp [P, T], ep [P, D/E, T], forward and backward [P-1, D, T]."""
        at, table = 0, {}
        layout = {
            "tp": (self.pipeline, self.data) if self.tensor > 1 else (),
            "dp": (self.pipeline, self.tensor) if self.data > 1 else (),
            "ep": (self.pipeline, self.data // self.expert, self.tensor) if self.expert > 1 else (),
        }
        for role, shape in layout.items():
            if shape:
                count = int(np.prod(shape))
                table[role] = np.arange(at, at + count, dtype=np.int32).reshape(shape)
                at += count
        pairs = np.arange(at, len(self.groups), dtype=np.int32).reshape(self.pipeline - 1, self.data, self.tensor, 2)
        table["forward"], table["backward"] = pairs[..., 0], pairs[..., 1]
        return table


def shape_for(ranks: int, expert: bool = False) -> Shape:
    """A shape of a usual kind with that many ranks: tensor 8, pipeline 8 or what divides, data at least 4.

    Raises:
        ValueError: there is none.
    """
    nodes = ranks // 8
    pipeline = next((p for p in (8, 10, 5, 4, 2) if nodes % p == 0 and nodes // p >= 4), 0)
    if ranks < 64 or ranks % 8 or not pipeline:
        raise ValueError(
            f"The simulator takes at least 64 ranks in an even number of nodes of 8, such as 64, 1024 or 10000; not {ranks}."
        )
    data = nodes // pipeline
    return Shape(data=data, tensor=8, pipeline=pipeline, expert=_expert(data) if expert else 1)


def _expert(data: int) -> int:
    return next((e for e in (8, 4, 5, 2) if data % e == 0), 1)
