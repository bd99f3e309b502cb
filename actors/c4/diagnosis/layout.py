"""Groups of a job in arrays: who is in which, with whom a rank is compared, and on which node it lives."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from actors.c4.diagnosis.observation import Group, RankRows

PIPELINE, EXPERT, DATA = "pp", "ep", "dp"


@dataclass(frozen=True)
class Layout:
    """G groups with M memberships over ranks 0 ... N-1."""

    groups: tuple[Group, ...]
    size: NDArray[np.int64]
    """[G]"""
    role: NDArray[np.int64]
    """[G], index into ``roles``."""
    roles: tuple[str, ...]
    member_group: NDArray[np.int64]
    """[M]"""
    member_rank: NDArray[np.int64]
    """[M]"""
    world: int
    """N."""
    data_group: NDArray[np.int64]
    """[N]: the data-parallel group of a rank, whose members do the same work (same stage, same shard); -1 for none."""

    def has_role(self, *names: str) -> NDArray[np.bool_]:
        """[G]: whether a group's role is one of ``names``."""
        return np.isin(self.role, [index for index, role in enumerate(self.roles) if role in names])


def layout_of(groups: tuple[Group, ...], ranks: RankRows) -> Layout:
    """The arrays of ``groups``; ranks without any group count into the world too."""
    size = np.array([len(group.ranks) for group in groups], dtype=np.int64)
    roles = tuple(dict.fromkeys(group.role for group in groups))
    place = {role: index for index, role in enumerate(roles)}
    role = np.array([place[group.role] for group in groups], dtype=np.int64)
    member_rank = np.fromiter(
        chain.from_iterable(group.ranks for group in groups), dtype=np.int64, count=int(size.sum())
    )
    member_group = np.repeat(np.arange(len(groups)), size)
    world = 1 + max(int(member_rank.max(initial=-1)), int(ranks.rank.max(initial=-1)))
    data_group = np.full(world, -1, dtype=np.int64)
    of_data = np.isin(role, [index for index, name in enumerate(roles) if name == DATA])[member_group]
    # Of several data-parallel groups of a rank (with and without context parallelism, say) the largest holds.
    order = np.argsort(size[member_group[of_data]], kind="stable")
    data_group[member_rank[of_data][order]] = member_group[of_data][order]
    return Layout(groups, size, role, roles, member_group, member_rank, world, data_group)


@dataclass(frozen=True)
class Places:
    """Where ranks live. Index: global rank; ``node`` is -1 and ``name`` empty for a rank that no agent told of."""

    node: NDArray[np.int64]
    names: tuple[str, ...]
    report_age_s: NDArray[np.float64]
    """inf for a rank that no agent told of."""

    def names_of(self, *ranks: int) -> tuple[str, ...]:
        """Nodes of the ranks, each once, in the ranks' order."""
        found = (int(self.node[rank]) for rank in ranks if rank < len(self.node))
        return tuple(dict.fromkeys(self.names[node] for node in found if node >= 0))


def places_of(ranks: RankRows, names: tuple[str, ...], world: int) -> Places:
    """The ranks' nodes and the age of what is known of them."""
    node = np.full(world, -1, dtype=np.int64)
    node[ranks.rank] = ranks.node
    age = np.full(world, np.inf)
    age[ranks.rank] = np.nan_to_num(ranks.report_age_s, nan=0.0, posinf=np.inf)
    return Places(node, names, age)
