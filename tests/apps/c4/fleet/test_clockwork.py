"""The simulated job: its shape, the schedule, how slowness and hangs travel, and that a seed gives the same bytes."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from actors.c4.diagnosis.observation import merge
from apps.c4.fleet.clockwork import Clockwork, Pace, effects_of, network_links, no_effects
from apps.c4.fleet.faults import FleetFault, Injected
from apps.c4.fleet.observe import Reporter, split
from apps.c4.fleet.shape import Shape, shape_for

SHAPE = Shape(data=4, tensor=8, pipeline=2, micro_batches=4)
STILL = Pace(noise=0.0, spread=0.0)


@pytest.mark.parametrize("ranks", [64, 256, 1024, 10_000])
def test_shapes_fill_their_ranks(ranks):
    shape = shape_for(ranks)
    assert shape.ranks == ranks
    assert shape.data >= 4


@pytest.mark.parametrize("ranks", [0, 60, 72, 1016])
def test_a_number_of_ranks_without_a_shape_is_refused(ranks):
    with pytest.raises(ValueError, match=str(ranks)):
        shape_for(ranks)


def test_every_rank_is_once_in_each_kind_of_group():
    for role in ("tp", "dp"):
        members = [rank for group in SHAPE.groups if group.role == role for rank in group.ranks]
        assert sorted(members) == list(range(SHAPE.ranks))
    for table in SHAPE.group_index.values():
        assert table.max() < len(SHAPE.groups)


def test_the_schedule_is_1f1b():
    shape = Shape(data=4, tensor=8, pipeline=4, micro_batches=4)
    last = [(backward, m) for wave in shape.order for stage, backward, m in wave if stage == 3]
    assert last == [(False, 0), (True, 0), (False, 1), (True, 1), (False, 2), (True, 2), (False, 3), (True, 3)]
    first = [(backward, m) for wave in shape.order for stage, backward, m in wave if stage == 0]
    assert first == [(False, 0), (False, 1), (False, 2), (False, 3), (True, 0), (True, 1), (True, 2), (True, 3)]


def test_a_slow_rank_makes_its_mates_wait_and_everybody_late():
    clock, other = Clockwork(SHAPE, STILL, 0), Clockwork(SHAPE, STILL, 0)
    slow = FleetFault(Injected.WORK_SLOW, (5,), factor=2.0)
    spoiled, healthy = clock.step(effects_of(SHAPE, [[slow]])), other.step(no_effects(SHAPE, 1))
    waits = (spoiled.ops["tp"].end - spoiled.ops["tp"].enter)[0, :, 0, 0].mean(axis=0)
    assert waits.argmin() == 5
    assert waits[5] < 0.7 * waits[0]
    assert clock.free.min() > other.free.max()
    assert (spoiled.ops["tp"].work[0, :, 0, 0, 0] == healthy.ops["tp"].work[0, :, 0, 0, 0]).all()


def test_a_hang_reaches_everybody_and_nobody_ends_the_step():
    clock = Clockwork(SHAPE, Pace(), 0)
    clock.step(effects_of(SHAPE, [[FleetFault(Injected.STUCK, (9,), wave=2)]]))
    assert not np.isfinite(clock.free).any()


def test_scenarios_side_by_side_do_not_touch_each_other():
    base = Clockwork(SHAPE, STILL, 0)
    clock = base.fork(2, 1)
    clock.step(effects_of(SHAPE, [[], [FleetFault(Injected.STUCK, (9,), wave=2)]]))
    assert np.isfinite(clock.free[:, 0]).all()
    assert not np.isfinite(clock.free[:, 1]).any()


def test_the_network_links_of_a_node_leave_it():
    for sends in (True, False):
        for a, b in network_links(SHAPE, range(8, 16), sends):
            assert (a if sends else b) in range(8, 16)
            assert a // 8 != b // 8
    assert len(network_links(SHAPE, range(8, 16), True)) == 16  # a data-parallel and a pipeline neighbour each


def tables(seen):
    for name in ("ranks", "progress", "links", "blocks", "link_blocks"):
        rows = getattr(seen, name)
        for field in fields(rows):
            yield f"{name}.{field.name}", getattr(rows, field.name)


def seen_after_two_steps(seed):
    clock, reporter = Clockwork(SHAPE, Pace(), seed), Reporter(SHAPE, Pace(), seed)
    first, second = (clock.step(no_effects(SHAPE, 1)) for _ in range(2))
    middle = float(clock.free.max()) - 0.2
    return reporter.observe(0, middle, first, second, 0, 0.5, [(0, first), (1, second)], links=True)


def test_the_same_seed_gives_the_same_bytes():
    for (name, a), (_, b) in zip(tables(seen_after_two_steps(3)), tables(seen_after_two_steps(3)), strict=True):
        assert a.tobytes() == b.tobytes(), name
    assert any(
        a.tobytes() != b.tobytes()
        for (_, a), (_, b) in zip(tables(seen_after_two_steps(3)), tables(seen_after_two_steps(4)), strict=False)
    )


def test_the_nodes_reports_merge_into_the_same_observation():
    whole = seen_after_two_steps(0)
    merged = merge(split(whole), whole.at_s)

    def named(seen):
        group = [one.name for one in seen.groups]
        table = {}
        for name in ("progress", "blocks", "link_blocks"):
            rows = getattr(seen, name)
            columns = [getattr(rows, field.name).tolist() for field in fields(rows) if field.name != "group"]
            table[name] = sorted((group[g], *(str(c[i]) for c in columns)) for i, g in enumerate(rows.group.tolist()))
        return table

    assert named(merged) == named(whole)
    assert merged.ranks.rank.tolist() == whole.ranks.rank.tolist()
    assert [merged.nodes[node] for node in merged.ranks.node] == [whole.nodes[node] for node in whole.ranks.node]
