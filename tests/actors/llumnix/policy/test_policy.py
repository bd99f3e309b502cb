"""Algorithm 1 of Llumnix worked by hand, and properties of dispatch, pairing and the choice of a request."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.llumnix.load import InstanceLoad, RequestLoad
from actors.llumnix.policy.dispatch import POLICIES, NoInstance, RoundRobin, admitted, demand, make_policy
from actors.llumnix.policy.rebalance import Move, RebalanceConfig, applied, pair
from actors.llumnix.policy.victim import SPARE_BLOCKS, choose_request, fits, improves, movable
from actors.llumnix.policy.virtual_usage import batch_size, freeness, newest, total_virtual_usage, virtual_usage


@dataclass
class New:
    tokens: int = 100
    priority: int = 0


def req(name: str, blocks: int, priority: int = 0, prefilled: bool = True, arrival: float = 0.0) -> RequestLoad:
    return RequestLoad(name, blocks, priority, blocks * 16, arrival, prefilled)


def load(name: str, running=(), waiting=(), total: int = 100, step: int = 1, **more) -> InstanceLoad:
    free = total - sum(r.blocks for r in running) - more.get("reserved_blocks", 0)
    return InstanceLoad(name, step, total, more.pop("free", free), 16, tuple(running), tuple(waiting), **more)


# ---- virtual usage and freeness, by hand ----


def test_running_requests_count_their_blocks():
    a = load("a", [req("x", 10), req("y", 30)])
    assert virtual_usage(a) == {"x": 10, "y": 30}
    assert freeness(a) == (100 - 40) / 2


def test_only_the_head_of_the_line_counts_its_demand():
    a = load("a", [req("x", 60), req("y", 30)], [req("head", 25), req("next", 50), req("last", 70)])
    assert virtual_usage(a) == {"x": 60, "y": 30, "head": 25, "next": 0, "last": 0}
    assert batch_size(a) == 3
    assert freeness(a) == (100 - 60 - 30 - 25) / 3 == -5  # Negative: it should send requests away.


def test_headroom_is_shared_by_the_requests_of_a_priority():
    a = load("a", [req("x", 10, 1), req("y", 20, 1), req("z", 5)])
    assert virtual_usage(a, {1: 40.0}) == {"x": 10 + 20, "y": 20 + 20, "z": 5}
    assert freeness(a, {1: 40.0}) == (100 - 75) / 3
    assert virtual_usage(load("b", [req("z", 5)]), {1: 40.0}) == {"z": 5}  # Nobody of that priority: no headroom.


def test_the_artifacts_headroom_is_the_capacity_minus_a_load_of_1600_tokens():
    a = load("a", [req("urgent", 60, 1), req("n", 60)], total=800)
    assert freeness(a, {1: 800 - 1600 / 16}) == (800 - (60 + 700) - 60) / 2 == -10


def test_a_draining_instance_is_infinitely_full():
    a = load("a", draining=True)
    assert total_virtual_usage(a) == math.inf and freeness(a) == -math.inf


def test_an_empty_instance_has_all_its_blocks_free():
    assert batch_size(load("a")) == 0 and freeness(load("a", total=80)) == 80
    assert freeness(load("a", total=80)) > freeness(load("b", [req("x", 1)], total=80))


def test_promised_blocks_count_and_shared_blocks_count_once():
    assert freeness(load("a", [req("x", 10)], reserved_blocks=30)) == 60
    # Two requests of 20 blocks that share a prefix of 15: 25 blocks in use.
    assert freeness(load("a", [req("x", 20), req("y", 20)], free=75)) == (100 - 25) / 2


def test_the_newer_of_two_loads_wins_whatever_the_order():
    old, new = load("a", [req("x", 90)], step=7), load("a", step=9)
    assert newest([old, new]) == newest([new, old]) == [new]
    assert [x.instance_id for x in newest([load("b"), new])] == ["a", "b"]


# ---- dispatch ----


def test_where_every_head_of_line_is_blocked_the_shortest_queue_gets_the_request():
    """The paper's freeness would send it behind the 26 requests of ``a``: its head is smaller than that of ``b``."""
    queue = [req(f"q{i}", 4) for i in range(26)]
    a, b = load("a", [req("x", 98)], queue), load("b", [req("y", 98)], [req("large", 20)])
    assert freeness(a) > freeness(b)
    assert make_policy("llumnix").choose([a, b], New()) == "b"


def test_the_freest_instance_gets_the_request():
    loads = [load("a", [req("x", 50)]), load("b", [req("y", 20), req("z", 20)]), load("c", [req("w", 45)])]
    assert [freeness(x) for x in loads] == [50, 30, 55]
    assert make_policy("llumnix").choose(loads, New()) == "c"
    assert make_policy("least_loaded").choose(loads, New()) == "b"


def test_a_blocked_head_of_line_turns_requests_away():
    blocked = load("a", [req("x", 60)], [req("head", 50)])
    assert make_policy("llumnix").choose([blocked, load("b", [req("y", 80)])], New()) == "b"
    assert make_policy("llumnix").choose([replace(blocked, waiting=()), load("b", [req("y", 80)])], New()) == "a"


def test_a_burst_spreads_before_any_load_is_reported():
    loads, policy, chosen = {name: load(name) for name in "abc"}, make_policy("llumnix"), []
    for n in range(9):
        name = policy.choose(list(loads.values()), New(tokens=100))
        chosen.append(name)
        loads[name] = replace(loads[name], waiting=(*loads[name].waiting, req(f"r{n}", 7, prefilled=False)))
    assert chosen == ["a", "b", "c"] * 3


def test_admitted_stops_at_the_first_that_does_not_fit():
    a = admitted(load("a", [req("x", 80)], [req("p", 15), req("q", 10), req("s", 1)]))
    assert [r.request_id for r in a.running] == ["x", "p"] and [r.request_id for r in a.waiting] == ["q", "s"]
    assert a.free_blocks == 5


def test_round_robin_takes_turns_also_when_instances_come_and_go():
    policy, loads = RoundRobin(), [load(name) for name in ("c", "a", "b")]
    assert [policy.choose(loads, New()) for _ in range(4)] == ["a", "b", "c", "a"]
    assert policy.choose([load("a"), load("c")], New()) == "c"
    assert policy.choose([load("a"), load("c"), load("d")], New()) == "d"


@pytest.mark.parametrize("name", POLICIES)
def test_who_cannot_be_chosen(name: str):
    policy = make_policy(name)
    assert policy.choose([load("a", draining=True), load("b", [req("x", 99)])], New()) == "b"
    assert policy.choose([load("a", total=5), load("b", total=500)], New(tokens=1000)) == "b"
    with pytest.raises(NoInstance, match="draining"):
        policy.choose([load("a", draining=True)], New())
    with pytest.raises(NoInstance, match="no instance"):
        policy.choose([], New())
    with pytest.raises(NoInstance, match="2000 tokens"):
        policy.choose([load("a")], New(tokens=2000))


def test_unknown_policies_are_named():
    with pytest.raises(ValueError, match="llumnix, round_robin, least_loaded"):
        make_policy("random")


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (15, 1), (16, 2), (31, 2), (32, 3)])
def test_demand_is_room_for_the_tokens_and_the_next(tokens: int, blocks: int):
    assert demand(New(tokens), 16) == blocks == -(-(tokens + 1) // 16)


# ---- which request moves, and where ----


def test_low_priority_then_short_then_late():
    a = load(
        "a",
        [
            *(req("urgent", 1, 1), req("long", 9), req("early", 4, arrival=1), req("late", 4, arrival=2)),
            req("pre", 1, prefilled=False),
        ],
        [req("queued", 3)],
        migrating=("gone",),
    )  # fmt: skip
    assert [r.request_id for r in movable(a)] == ["late", "early", "long", "urgent"]
    assert [r.request_id for r in movable(replace(a, migrating=("late",)))] == ["early", "long", "urgent"]
    everything = [r.request_id for r in movable(a, waiting=True)]
    assert everything == ["late", "early", "long", "urgent", "pre", "queued"]


def test_the_request_fits_beside_the_destinations_head_of_line():
    x = req("x", 20)
    assert fits(x, load("b", [req("y", 80 - SPARE_BLOCKS)]))
    assert not fits(x, load("b", [req("y", 81 - SPARE_BLOCKS)]))
    assert not fits(x, load("b", [req("y", 60)], [req("head", 19)]))


def test_a_worked_pairing():
    crowded = load("a", [req("x", 40), req("y", 30), req("z", 28)])
    middle, idle = load("b", [req("w", 50)]), load("c", [req("v", 10)])
    assert [round(freeness(x), 2) for x in (crowded, middle, idle)] == [0.67, 50, 90]
    # z goes: a -> (100 - 70) / 2 = 15, c -> (100 - 38) / 2 = 31.
    assert pair([middle, idle, crowded]) == [Move("a", "c", "z")]
    # The freest cannot hold any of them: the next does.
    full_of_promises = replace(idle, free_blocks=5)
    assert pair([middle, full_of_promises, crowded]) == [Move("a", "b", "z")]


def test_thresholds_busy_and_incompatible_instances():
    a, b = load("a", [req("x", 50), req("y", 48)]), load("b")
    assert pair([a, b]) == [Move("a", "b", "y")]
    assert pair([a, b], RebalanceConfig(source_below=1.0)) == []
    assert pair([a, b], RebalanceConfig(destination_above=100)) == []
    assert pair([a, b], busy={"b"}) == [] == pair([a, b], busy={"a"})
    assert pair([a, b], compatible=lambda source, destination: False) == []
    assert pair([replace(a, migrating=("x", "y")), b]) == []


def test_a_draining_source_is_emptied_first_down_to_its_queue():
    drain = load("d", [req("pre", 3, prefilled=False)], [req("queued", 2)], draining=True)
    crowded, busy_one = load("a", [req("x", 50), req("y", 48)]), load("b", [req("v", 10)] * 1)
    assert pair([crowded, drain, busy_one]) == [Move("d", "b", "pre")]
    assert pair([replace(drain, migrating=("pre",)), busy_one]) == [Move("d", "b", "queued")]
    assert pair([load("e", draining=True), busy_one]) == []


def test_no_request_moves_when_that_only_swaps_the_roles():
    # One request fills the source: it would fill the destination as well.
    a, b = load("a", [req("x", 98)]), load("b", total=100)
    assert freeness(a) == 2 and not improves(a, b, a.running[0])
    assert choose_request(a, b) is None


requests = st.builds(
    req,
    name=st.uuids().map(str),
    blocks=st.integers(1, 40),
    priority=st.integers(0, 2),
    prefilled=st.booleans(),
    arrival=st.floats(0, 10),
)


@st.composite
def clusters(draw) -> list[InstanceLoad]:
    loads = []
    for name in "abcdef"[: draw(st.integers(1, 6))]:
        total = draw(st.integers(20, 200))
        running = []
        for r in draw(st.lists(requests, max_size=6)):
            if sum(x.blocks for x in running) + r.blocks <= total:
                running.append(r)
        loads.append(
            load(name, running, draw(st.lists(requests, max_size=3)), total, draining=draw(st.integers(0, 5)) == 0)
        )
    return loads


headrooms = st.sampled_from([{}, {1: 10.0}, {1: 10.0, 2: 60.0}])


@given(clusters(), st.integers(0, 5000), st.randoms(use_true_random=False))
def test_choices_do_not_depend_on_the_order_of_the_loads(loads, tokens, random):
    shuffled = list(loads)
    random.shuffle(shuffled)
    for name in POLICIES:
        results = []
        for given_loads in (loads, shuffled):
            try:
                results.append(make_policy(name).choose(given_loads, New(tokens)))
            except NoInstance as error:
                results.append(str(error))
        assert results[0] == results[1]
    assert pair(loads) == pair(shuffled)


@given(clusters(), headrooms)
def test_every_ordered_move_is_possible_and_worth_it(loads, headroom):
    config = RebalanceConfig()
    by_id = {x.instance_id: x for x in loads}
    moves = pair(loads, config, headroom=headroom)
    touched = [name for move in moves for name in (move.source, move.destination)]
    assert len(touched) == len(set(touched))
    for move in moves:
        source, destination = by_id[move.source], by_id[move.destination]
        request = next(r for r in (*source.running, *source.waiting) if r.request_id == move.request_id)
        assert not destination.draining and request.blocks <= destination.free_blocks
        assert freeness(source, headroom) < config.source_below
        if not source.draining:
            assert request in source.running and request.prefilled
            assert freeness(destination, headroom) > config.destination_above
            after = {x.instance_id: x for x in applied(loads, move)}
            pair_after = min(freeness(after[n], headroom) for n in (move.source, move.destination))
            assert pair_after > min(freeness(source, headroom), freeness(destination, headroom)) + config.min_gain


@given(clusters(), headrooms)
def test_rebalancing_an_unchanging_load_comes_to_rest(loads, headroom):
    seen = set()
    for _ in range(200):
        moves = pair(loads, headroom=headroom)
        if not moves:
            break
        for move in moves:
            loads = applied(loads, move)
        where = tuple(sorted((r.request_id, x.instance_id) for x in loads for r in x.running))
        assert where not in seen, "requests go round in circles"
        seen.add(where)
    else:
        raise AssertionError("still moving after 200 rounds")


@given(clusters(), headrooms)
def test_freeness_is_what_algorithm_1_says(loads, headroom):
    for x in loads:
        if x.draining:
            continue
        total = 0.0
        for r in x.running:
            same = [q for q in x.running if q.priority == r.priority]
            total += r.blocks + headroom.get(r.priority, 0) / len(same)
        if x.waiting:
            total += x.waiting[0].blocks
        b = max(1, len(x.running) + (1 if x.waiting else 0))
        assert freeness(x, headroom) == pytest.approx((x.total_blocks - total) / b)
