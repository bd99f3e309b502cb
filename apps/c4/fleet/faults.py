"""Faults of the simulated job: what is broken, how badly, from when; drawn by seed. The truth that verdicts are judged by."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from apps.c4.fleet.shape import GPUS_PER_NODE, Shape


class Injected(StrEnum):
    """What is done to the job."""

    DEAD = "process dead"
    STOPPED = "process stopped"
    GIL = "interpreter locked"
    STUCK = "stuck outside"
    NODE_LOST = "node lost"
    MISMATCH = "wrong collective"
    LINK_STALL = "link stalled"
    LINK_SLOW = "link slow"
    SENDER_SLOW = "sender slow"
    RECEIVER_SLOW = "receiver slow"
    WORK_SLOW = "slow rank"
    NODE_WORK_SLOW = "slow node"

    @property
    def is_hang(self) -> bool:
        return self in HANGS


HANGS = (
    Injected.DEAD,
    Injected.STOPPED,
    Injected.GIL,
    Injected.STUCK,
    Injected.NODE_LOST,
    Injected.MISMATCH,
    Injected.LINK_STALL,
)
CLASSES = {
    "non_communication_hang": (Injected.DEAD, Injected.STOPPED, Injected.GIL, Injected.STUCK, Injected.NODE_LOST),
    "communication_hang": (Injected.MISMATCH, Injected.LINK_STALL),
    "communication_slow": (Injected.LINK_SLOW, Injected.SENDER_SLOW, Injected.RECEIVER_SLOW),
    "non_communication_slow": (Injected.WORK_SLOW, Injected.NODE_WORK_SLOW),
}


@dataclass(frozen=True)
class FleetFault:
    """One injected fault."""

    kind: Injected
    ranks: tuple[int, ...] = ()
    """The culprit; empty for a link."""
    link: tuple[int, int] | None = None
    factor: float = 1.0
    """Of slow kinds: how many times longer."""
    wave: int = 0
    """Of hangs: how many turns (forward or backward passes) of its stage are done in the step when it strikes."""
    bucket: int = -1
    """Of hangs in the data-parallel phase: the all-reduce in which it strikes; -1 for a turn."""
    inside: bool = False
    """Of a single process that stops: within an operation that all have entered, not between two."""

    @property
    def fault_class(self) -> str:
        return next(name for name, kinds in CLASSES.items() if self.kind in kinds)

    def __str__(self) -> str:
        who = f"link {self.link[0]}->{self.link[1]}" if self.link else f"ranks {', '.join(map(str, self.ranks[:8]))}"
        return f"{self.kind}: {who}" + (f" x {self.factor:.2f}" if self.factor > 1 else "")


def draw_fault(
    shape: Shape, rng: np.random.Generator, kind: Injected, slowdown: tuple[float, float] = (1.5, 4.0)
) -> FleetFault:
    """A fault of this kind anywhere in the job."""
    factor = float(rng.uniform(*slowdown))
    rank = int(rng.integers(shape.ranks))
    wave, bucket = int(rng.integers(2 * shape.micro_batches)), -1
    node = tuple(range(rank // GPUS_PER_NODE * GPUS_PER_NODE, (rank // GPUS_PER_NODE + 1) * GPUS_PER_NODE))
    match kind:
        case Injected.NODE_LOST:
            return FleetFault(kind, node, wave=wave)
        case Injected.DEAD | Injected.STOPPED | Injected.GIL | Injected.STUCK:
            inside = kind is not Injected.STUCK and rng.random() < 0.4
            return FleetFault(kind, (rank,), wave=wave, inside=inside)
        case Injected.MISMATCH:
            if rng.random() < 0.5:
                bucket = int(rng.integers(shape.buckets))
            return FleetFault(kind, (rank,), wave=wave, bucket=bucket)
        case Injected.LINK_STALL:
            link, bucket = _link(shape, rng, rank)
            return FleetFault(kind, link=link, wave=wave, bucket=int(rng.integers(shape.buckets)) if bucket else -1)
        case Injected.LINK_SLOW:
            return FleetFault(kind, link=_link(shape, rng, rank)[0], factor=factor)
        case Injected.NODE_WORK_SLOW:
            return FleetFault(kind, node, factor=factor)
        case Injected.SENDER_SLOW | Injected.RECEIVER_SLOW:
            return FleetFault(kind, node if rng.random() < 0.5 else (rank,), factor=factor)
    return FleetFault(kind, (rank,), factor=factor)


def _link(shape: Shape, rng: np.random.Generator, rank: int) -> tuple[tuple[int, int], bool]:
    """A connection out of ``rank``, and whether it is one of the data-parallel ring."""
    stage, d, t = shape.place(rank)
    of = shape.rank_of
    ways = [(int(of[stage, d, (t + 1) % shape.tensor]), False), (int(of[stage, (d + 1) % shape.data, t]), True)]
    if stage + 1 < shape.pipeline:
        ways.append((int(of[stage + 1, d, t]), False))
    if stage > 0:
        ways.append((int(of[stage - 1, d, t]), False))
    to, data = ways[int(rng.integers(len(ways)))]
    return (rank, to), data


def draw_pair(
    shape: Shape, rng: np.random.Generator, slowdown: tuple[float, float] = (1.5, 4.0)
) -> tuple[FleetFault, FleetFault]:
    """Two faults of different classes on different nodes. A slow one has gone on for some steps when a hang strikes."""
    names = list(CLASSES)
    while True:
        first, second = rng.choice(len(names), size=2, replace=False)
        kinds = [CLASSES[names[index]] for index in (first, second)]
        pair = tuple(draw_fault(shape, rng, options[int(rng.integers(len(options)))], slowdown) for options in kinds)
        nodes = [{rank // GPUS_PER_NODE for rank in (fault.link or fault.ranks)} for fault in pair]
        if not nodes[0] & nodes[1]:
            return pair  # type: ignore[return-value]
