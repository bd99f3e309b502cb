"""Jobs and their connections: rings and trees over the nodes of a job, or over DP, TP and PP groups of its ranks.

A channel is what advances together: one ring (or one pair of trees) of a group through one NIC of each node. Connections
whose ends are in one node run over NVLink and are not listed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from actors.c4.paths.errors import PathError
from actors.c4.paths.topology import Fabric, Floats, Ints

Collective = Literal["ring", "tree"]


@dataclass(frozen=True)
class Connections:
    """C connections of several jobs; arrays [C]."""

    src_nic: Ints
    dst_nic: Ints
    channel: Ints
    demand: Floats
    """Rate of the connection for a unit of its channel's rate."""
    channel_job: Ints
    """[channels]: the job of each channel."""

    def __len__(self) -> int:
        return len(self.src_nic)

    @property
    def channels(self) -> int:
        return len(self.channel_job)

    @property
    def jobs(self) -> int:
        return int(self.channel_job.max()) + 1 if len(self.channel_job) else 0


def joined(parts: Sequence[Connections]) -> Connections:
    """Several jobs' connections as one; jobs and channels are numbered on."""
    channel, job, channels, jobs = [], [], 0, 0
    for part in parts:
        channel.append(part.channel + channels)
        job.append(part.channel_job + jobs)
        channels, jobs = channels + part.channels, jobs + part.jobs
    return Connections(
        np.concatenate([part.src_nic for part in parts]),
        np.concatenate([part.dst_nic for part in parts]),
        np.concatenate(channel),
        np.concatenate([part.demand for part in parts]),
        np.concatenate(job),
    )


def ring_edges(members: Sequence[int]) -> list[tuple[int, int, float]]:
    """(from, to, demand) of a ring; every connection carries the channel's bus bandwidth."""
    count = len(members)
    return [(members[i], members[(i + 1) % count], 1.0) for i in range(count)] if count > 1 else []


def tree_edges(members: Sequence[int]) -> list[tuple[int, int, float]]:
    """(from, to, demand) of a double binary tree (Sanders, Speck, Traeff 2009; NCCL): each tree moves half of the data.

    The second tree is the first one with the members shifted by one, so that a leaf of one is an inner node of the other.
    Data goes
    up (reduce) and down (broadcast) every edge; the demand is that of a unit of bus bandwidth, 2(n-1)/n times the algorithm's.
    """
    count = len(members)
    if count < 2:
        return []
    share = 0.5 * count / (2 * (count - 1))
    found: dict[tuple[int, int], float] = {}
    for shift in (0, 1):
        for child in range(count):
            parent = _tree_parent(child, count)
            if parent is None:
                continue
            a, b = members[(child + shift) % count], members[(parent + shift) % count]
            for edge in ((a, b), (b, a)):
                found[edge] = found.get(edge, 0.0) + share
    return [(a, b, demand) for (a, b), demand in found.items()]


def _tree_parent(rank: int, count: int) -> int | None:
    """Parent in the binary tree by lowest set bit (NCCL's ncclGetBtree); rank 0 is the root."""
    if rank == 0:
        return None
    bit = rank & -rank
    up = (rank ^ bit) | (bit << 1)
    return rank ^ bit if up >= count else up


_EDGES = {"ring": ring_edges, "tree": tree_edges}


def job_connections(
    fabric: Fabric, nodes: Sequence[int], collective: Collective = "ring", nics: Sequence[int] | None = None
) -> Connections:
    """One all-reduce over whole nodes: a channel for each NIC, through the NICs of that index.

    Raises:
        PathError: a node that is not there or stands twice, an unknown collective.
    """
    spec = fabric.spec
    if len(set(nodes)) != len(nodes) or any(not 0 <= node < spec.nodes for node in nodes):
        raise PathError(f"A job's nodes must be different numbers from 0 to {spec.nodes - 1}.")
    if collective not in _EDGES:
        raise PathError(f"There is no collective {collective!r}: choose ring or tree.")
    indices = list(range(spec.nics_per_node)) if nics is None else list(nics)
    groups = [[int(fabric.nic(node, index)) for node in nodes] for index in indices]
    return _from_groups([(group, collective, 1.0) for group in groups])


def parallel_job(
    fabric: Fabric, nodes: Sequence[int], tp: int, pp: int, dp: int, kinds: Mapping[str, Collective | Literal["chain"]]
) -> Connections:
    """The groups of a job with one rank a NIC, ranks in Megatron's order: TP fastest, then DP, then PP.

    Args:
        nodes: ``tp * pp * dp / nics_per_node`` of them.
        kinds: which groups talk and how: "dp", "tp" -> "ring" or "tree"; "pp" -> "chain" (activations forth, gradients back).

    Raises:
        PathError: sizes do not fit.
    """
    per_node = fabric.spec.nics_per_node
    if tp * pp * dp != len(nodes) * per_node:
        raise PathError(f"TP {tp} x PP {pp} x DP {dp} are not the {len(nodes) * per_node} GPUs of {len(nodes)} nodes.")
    grid = np.arange(tp * pp * dp).reshape(pp, dp, tp)
    lines = {"tp": grid.reshape(-1, tp), "dp": np.moveaxis(grid, 1, 2).reshape(-1, dp),
             "pp": np.moveaxis(grid, 0, 2).reshape(-1, pp)}  # fmt: skip
    groups: list[tuple[list[int], str, float]] = []
    for name, kind in kinds.items():
        if name not in lines:
            raise PathError(f"There is no kind of group {name!r}: choose dp, tp or pp.")
        for line in lines[name]:
            members = [int(fabric.nic(nodes[rank // per_node], rank % per_node)) for rank in line]
            groups.append((members, kind, 1.0))
    return _from_groups(groups, per_node)


def _from_groups(groups: Sequence[tuple[Sequence[int], str, float]], nics_per_node: int = 0) -> Connections:
    """``nics_per_node``: connections inside a node are dropped; 0 keeps all."""
    src, dst, channel, demand, channels = [], [], [], [], 0
    for members, kind, scale in groups:
        if kind == "chain":
            pairs = list(itertools.pairwise(members))
            edges = [(a, b, 1.0) for a, b in pairs] + [(b, a, 1.0) for a, b in pairs]
        else:
            edges = _EDGES[kind](members)
        kept = [edge for edge in edges if not nics_per_node or edge[0] // nics_per_node != edge[1] // nics_per_node]
        if not kept:
            continue
        for a, b, part in kept:
            src.append(a)
            dst.append(b)
            channel.append(channels)
            demand.append(part * scale)
        channels += 1
    return Connections(
        np.asarray(src, np.int64), np.asarray(dst, np.int64), np.asarray(channel, np.int64), np.asarray(demand, float),
        np.zeros(channels, np.int64),
    )  # fmt: skip


def paper_jobs(fabric: Fabric) -> Connections:
    """The paper's eight concurrent jobs of two nodes each, one in each group, so that all traffic crosses the spines."""
    half = fabric.spec.nodes // 2
    return joined([job_connections(fabric, (node, node + half)) for node in range(half)])


def scattered_jobs(fabric: Fabric, seed: int, smallest: int = 2, largest: int = 64) -> Connections:
    """Jobs of random power-of-two sizes that fill the fabric, on random nodes: what a long-lived scheduler leaves."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(fabric.spec.nodes)
    sizes = [size for size in (2**k for k in range(11)) if smallest <= size <= min(largest, len(order))]
    if not sizes:
        raise PathError(f"No job of {smallest} to {largest} nodes fits {fabric.spec.nodes} nodes.")
    jobs, at = [], 0
    while len(order) - at >= sizes[0]:
        size = int(rng.choice([one for one in sizes if one <= len(order) - at]))
        jobs.append(job_connections(fabric, [int(node) for node in order[at : at + size]]))
        at += size
    return joined(jobs)
