"""Layouts of a hybrid GPU: which slices serve and which train; what each offers; and how one becomes another."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from actors.mig.geometry import GpuGeometry, GpuState, Placement, maximal_multisets, repartition

Role = Literal["serve", "train"]


@dataclass(frozen=True)
class Layout:
    """Profiles that serve and profiles that train, each sorted."""

    serve: tuple[str, ...]
    train: tuple[str, ...]

    @property
    def profiles(self) -> tuple[str, ...]:
        return self.serve + self.train

    def __str__(self) -> str:
        return f"serve {'+'.join(self.serve) or 'nothing'}, train {'+'.join(self.train) or 'nothing'}"


@dataclass(frozen=True)
class Work:
    """What the two workloads do on a slice of each profile."""

    serve_ms: Mapping[str, tuple[float, ...]]
    """For each profile the latency of a batch of 1, 2, ... requests, as large as the latency limit and memory allow."""
    train_per_s: Mapping[str, float]
    """Samples a second of a training; profiles on which it does not fit are missing."""

    def capacity_per_s(self, serve: Sequence[str]) -> float:
        """Requests a second of saturated servers with full batches."""
        return sum(max((n + 1) / ms * 1e3 for n, ms in enumerate(self.serve_ms[name])) for name in serve)

    def training_per_s(self, train: Sequence[str]) -> float:
        """Samples a second of all trainings."""
        return sum(self.train_per_s[name] for name in train)


@dataclass(frozen=True)
class Offer:
    """A layout and what it gives."""

    layout: Layout
    capacity_per_s: float
    training_per_s: float


def offers(geometry: GpuGeometry, work: Work) -> tuple[Offer, ...]:
    """Every maximal layout that serves and trains, by rising capacity. Those that another one beats in both are stepping stones:
    a way from one layout to another on which servers stay up."""
    known = {name for name in (p.name for p in geometry.profiles) if name in work.serve_ms or name in work.train_per_s}
    found: dict[Layout, Offer] = {}
    for names in maximal_multisets(geometry.restricted(known)):
        for count in range(1, len(names)):
            for serving in set(itertools.combinations(names, count)):
                rest = tuple(sorted((Counter(names) - Counter(serving)).elements()))
                if not set(serving) <= set(work.serve_ms) or not set(rest) <= set(work.train_per_s):
                    continue
                layout = Layout(tuple(sorted(serving)), rest)
                found[layout] = Offer(layout, work.capacity_per_s(serving), work.training_per_s(rest))
    return tuple(sorted(found.values(), key=lambda one: (one.capacity_per_s, one.training_per_s)))


def front(every: Sequence[Offer]) -> tuple[Offer, ...]:
    """The offers that no other one beats in both capacity and training, by rising capacity."""
    front: list[Offer] = []
    for offer in sorted(every, key=lambda one: (-one.training_per_s, -one.capacity_per_s, one.layout.profiles)):
        if not front or offer.capacity_per_s > front[-1].capacity_per_s:
            front.append(offer)
    return tuple(front)


@dataclass(frozen=True)
class Slot:
    """A slice that exists, and what it does."""

    place: Placement
    role: Role


@dataclass(frozen=True)
class Transition:
    """From slots to slots: ``keep`` go on undisturbed, ``stop`` end, ``start`` begin; ``cut`` says whether instances change."""

    keep: tuple[Slot, ...]
    stop: tuple[Slot, ...]
    start: tuple[Slot, ...]
    cut: bool

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.keep + self.start


@lru_cache(maxsize=65536)
def transition(geometry: GpuGeometry, slots: tuple[Slot, ...], target: Layout) -> Transition:
    """The change that disturbs least: fewest instances cut, and what stays keeps its role as far as the target allows.

    Raises:
        GeometryError: a target that the GPU cannot hold.
    """
    change = repartition(GpuState.of(geometry, [slot.place for slot in slots]), list(target.profiles))
    role = {slot.place: slot.role for slot in slots}
    left: dict[Role, Counter[str]] = {"serve": Counter(target.serve), "train": Counter(target.train)}
    keep, open_places = [], list(change.create)
    for place in change.keep:
        if left[role[place]][place.profile] > 0:
            left[role[place]][place.profile] -= 1
            keep.append(Slot(place, role[place]))
        else:
            open_places.append(place)
    start = []
    for place in open_places:
        kind: Role = "serve" if left["serve"][place.profile] > 0 else "train"
        left[kind][place.profile] -= 1
        start.append(Slot(place, kind))
    stop = tuple(slot for slot in slots if slot not in keep)
    return Transition(tuple(keep), stop, tuple(start), bool(change.create or change.destroy))
