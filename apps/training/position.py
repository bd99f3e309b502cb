"""Position in the data as a pure function of the step: epoch after epoch in seeded orders, so that resuming needs no state."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Place:
    """Where a step stands: ``epoch`` and ``batch`` in it, both from 0."""

    epoch: int
    batch: int


def steps_per_epoch(examples: int, batch: int) -> int:
    """Whole global batches in an epoch; the rest of an order is left for the next one.

    Raises:
        ValueError: ``batch`` is larger than the data, so that there would be none.
    """
    if not 1 <= batch <= examples:
        raise ValueError(f"a batch of {batch} cannot be drawn from {examples} examples")
    return examples // batch


def place_of(step: int, examples: int, batch: int) -> Place:
    """Epoch and batch of ``step`` (from 0)."""
    epoch, index = divmod(step, steps_per_epoch(examples, batch))
    return Place(epoch, index)


def batch_indices(step: int, examples: int, batch: int, seed: int, rank: int = 0, world_size: int = 1) -> torch.Tensor:
    """Indices [batch / world_size] of this rank's share of the global batch of ``step``.

    Every epoch has an order of its own; the global batch does not depend on the number of workers.

    Raises:
        ValueError: the batch cannot be divided among the workers, or is larger than the data.
    """
    share = share_of(batch, world_size)
    place = place_of(step, examples, batch)
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(mix(seed, place.epoch)))
    first = place.batch * batch + rank * share
    return order[first : first + share]


def share_of(batch: int, world_size: int) -> int:
    """A worker's part of the global batch; ValueError where it is no whole number."""
    if batch % world_size:
        raise ValueError(f"a batch of {batch} cannot be divided among {world_size} workers")
    return batch // world_size


def mix(*parts: int) -> int:
    """One seed below 2**63 from several numbers; neighbours give unrelated streams."""
    value = 0
    for part in parts:
        # SplitMix64's finaliser (Steele, Lea, Flood 2014).
        value = (value + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        value ^= value >> 31
    return value >> 1
