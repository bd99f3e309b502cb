"""All states of a GPU: every legal set of instances, the maximal ones, and the same without the places (multisets of
profiles)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

from actors.mig.geometry.model import GpuGeometry
from actors.mig.geometry.state import GpuState, bits, fits


@lru_cache(maxsize=64)
def all_states(geometry: GpuGeometry) -> tuple[GpuState, ...]:
    """Every legal state, the empty one first, by number of instances. A100 / H100 have 2,319, A30 without +me 26."""
    masks: list[int] = []

    def extend(mask: int, first: int) -> None:
        masks.append(mask)
        for number in range(first, len(geometry.placements)):
            if fits(geometry, mask, number):
                extend(mask | 1 << number, number + 1)

    extend(0, 0)
    return tuple(GpuState(geometry, mask) for mask in sorted(masks, key=lambda mask: (mask.bit_count(), mask)))


@lru_cache(maxsize=64)
def maximal_states(geometry: GpuGeometry) -> tuple[GpuState, ...]:
    """The states to which nothing can be added (A100 / H100: 239)."""
    return tuple(state for state in all_states(geometry) if state.is_maximal())


@lru_cache(maxsize=64)
def layouts_by_multiset(geometry: GpuGeometry) -> Mapping[tuple[str, ...], tuple[GpuState, ...]]:
    """For each multiset of profiles (sorted names) that fits, every state that realises it."""
    found: dict[tuple[str, ...], list[GpuState]] = {}
    for state in all_states(geometry):
        found.setdefault(multiset(state), []).append(state)
    return {names: tuple(states) for names, states in found.items()}


@lru_cache(maxsize=64)
def maximal_multisets(geometry: GpuGeometry) -> tuple[tuple[str, ...], ...]:
    """The multisets of profiles of which none is a part of another (base profiles of A100: 14)."""
    every = [Counter(names) for names in layouts_by_multiset(geometry)]
    return tuple(
        tuple(sorted(one.elements()))
        for one in every
        if not any(one is not other and _part_of(one, other) and one != other for other in every)
    )


def multiset(state: GpuState) -> tuple[str, ...]:
    """The profiles of a state with repetition, sorted."""
    return tuple(sorted(state.geometry.placements[number].profile for number in bits(state.mask)))


def _part_of(part: Counter[str], whole: Counter[str]) -> bool:
    return all(whole[name] >= count for name, count in part.items())
