"""Moves and re-partitions are the fewest: compared with exhaustive search over all states."""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from functools import lru_cache

import pytest

from actors.mig.geometry import (
    GeometryError,
    GpuState,
    IllegalPlacement,
    all_states,
    gpu_geometry,
    make_room,
    multiset,
    place_best,
    repartition,
)

A30 = gpu_geometry("A30").restricted({"1g.6gb", "2g.12gb", "4g.24gb"})
A100 = gpu_geometry("A100-80GB")


@lru_cache
def fleets(gpu: str, gpus: int) -> dict[frozenset, list[tuple[GpuState, ...]]]:
    """Every fleet of so many GPUs, by the instances that it holds."""
    found = defaultdict(list)
    for fleet in itertools.product(all_states({"A30": A30, "A100": A100}[gpu]), repeat=gpus):
        found[frozenset(sum((state.profiles for state in fleet), Counter()).items())].append(fleet)
    return found


def fewest_moves(gpu: str, states: list[GpuState], profile: str) -> int | None:
    """Over all fleets with the same instances and the request: how many of the old are not where they were."""
    wanted = sum((state.profiles for state in states), Counter()) + Counter([profile])
    return min(
        (
            sum((old.mask & ~new.mask).bit_count() for old, new in zip(states, fleet, strict=True))
            for fleet in fleets(gpu, len(states))[frozenset(wanted.items())]
        ),
        default=None,
    )


@pytest.mark.parametrize("gpus", [1, 2])
def test_make_room_moves_as_few_as_possible(gpus):
    rng = random.Random(gpus)
    met = Counter()
    for _ in range(60 if gpus == 1 else 25):
        states = rng.choices(all_states(A30), k=gpus)
        profile = rng.choice(["1g.6gb", "2g.12gb", "4g.24gb"])
        expected = fewest_moves("A30", states, profile)
        found = make_room(states, profile, max_moves=4)
        met[expected] += 1
        assert (None if found is None else len(found.moves)) == expected, (states, profile)
    assert met[0]
    assert met[1]


def test_make_room_on_an_a100_against_all_its_states():
    rng = random.Random(5)
    for _ in range(40):
        state = rng.choice(all_states(A100))
        profile = rng.choice(A100.profiles).name
        expected = fewest_moves("A100", [state], profile)
        found = make_room([state], profile, max_moves=6)
        assert (None if found is None else len(found.moves)) == expected, (state, profile)


def test_moves_can_be_carried_out_and_lead_to_the_states_promised():
    rng = random.Random(2)
    for _ in range(150):
        before = rng.choices(all_states(A100), k=3)
        found = make_room(before, rng.choice(A100.profiles).name, max_moves=2)
        if found is None:
            continue
        states = list(before)
        for move in found.moves:
            states[move.from_gpu] = states[move.from_gpu].remove(move.source.profile, move.source.start)
        for move in found.moves:
            assert move.source.profile == move.target.profile
            states[move.to_gpu] = states[move.to_gpu].place(move.target.profile, move.target.start)
        states[found.gpu] = states[found.gpu].place(found.placement.profile, found.placement.start)
        assert tuple(states) == found.states


def test_a_pinned_instance_never_moves():
    state = GpuState.of(A100, [("1g.10gb", 0), ("1g.10gb", 4)])
    first, second = state.placements
    assert len(make_room([state], "4g.40gb").moves) == 1
    assert make_room([state], "4g.40gb", pinned=[(0, first)]) is None
    free = make_room([state], "3g.40gb", pinned=[(0, first)])
    assert [move.source for move in free.moves] == [second]


def test_place_best_keeps_room_for_large_instances():
    gpu, place = place_best([GpuState(A100), GpuState.of(A100, [("3g.40gb", 4), ("2g.20gb", 0)])], "1g.10gb")
    assert (gpu, place.start) in {(1, 2), (1, 3)}  # beside others, not on the empty GPU
    assert place_best([GpuState.of(A100, [("7g.80gb", 0)])], "1g.10gb") is None
    assert place_best([], "1g.10gb") is None
    with pytest.raises(GeometryError, match="one geometry only"):
        place_best([GpuState(A100), GpuState(A30)], "7g.80gb")


def test_repartition_keeps_as_much_as_any_layout_of_the_target_does():
    rng = random.Random(4)
    states = all_states(A100)
    for _ in range(40):
        old, wanted = rng.choice(states), rng.choice(states)
        names = [place.profile for place in wanted.placements]
        change = repartition(old, names)
        kept = max((old.mask & state.mask).bit_count() for state in states if multiset(state) == tuple(sorted(names)))
        assert len(change.keep) == kept
        assert change.target.profiles == Counter(names)
        assert change.steps == old.mask.bit_count() + len(names) - 2 * kept
        result = old
        for place in change.destroy:
            result = result.remove(place.profile, place.start)
        for place in change.create:
            result = result.place(place.profile, place.start)
        assert result == change.target


def test_repartition_to_given_places_and_around_pinned_ones():
    state = GpuState.of(A100, [("1g.10gb", 4), ("2g.20gb", 0)])
    assert repartition(state, [("1g.10gb", 6), "2g.20gb"]).destroy == (A100.placement("1g.10gb", 4),)
    pinned = [A100.placement("1g.10gb", 4)]
    assert repartition(state, ["4g.40gb", "1g.10gb"], pinned=pinned).keep == tuple(pinned)
    with pytest.raises(GeometryError, match=r"3g\.40gb \+ 4g\.40gb do not fit on one A100-80GB with 1g\.10gb@4"):
        repartition(state, ["3g.40gb", "4g.40gb"], pinned=pinned)
    with pytest.raises(GeometryError, match=r"4g\.40gb \+ 4g\.40gb do not fit on one A100-80GB\."):
        repartition(state, ["4g.40gb", "4g.40gb"])
    with pytest.raises(GeometryError, match="twice"):
        repartition(state, [("1g.10gb", 0), ("1g.10gb", 0)])
    with pytest.raises(IllegalPlacement, match="is to stay, but it is not on"):
        repartition(state, ["3g.40gb"], pinned=[A100.placement("3g.40gb", 0)])
    assert repartition(state, []).destroy == state.placements
