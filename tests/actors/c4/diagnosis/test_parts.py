"""The parts of the diagnosis: histories, medians, labels of the like, the step's period, merging, and ten thousand ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.c4.diagnosis.diagnose import diagnose
from actors.c4.diagnosis.history import basis_of_like, masked_median, median_of_others, no_history, series_key
from actors.c4.diagnosis.layout import layout_of
from actors.c4.diagnosis.memory import DiagnosisMemory
from actors.c4.diagnosis.observation import Group, merge
from actors.c4.diagnosis.period import step_period
from actors.c4.diagnosis.verdict import FaultKind
from actors.c4.diagnosis.work import like_labels
from tests.actors.c4.diagnosis.builders import STEP_S, At, block_rows, observation, progress, ranks


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.floats(0, 9, width=32)), min_size=1, max_size=60))
def test_a_history_keeps_the_newest_blocks_in_whatever_order_and_how_often_they_come(rows):
    width, table = 8, no_history(1, 8)
    truth: dict[tuple[int, int], float] = {}
    for rank, block, value in rows:
        truth.setdefault((rank, block), np.float32(value))
    sent = [(rank, block, truth[rank, block]) for rank, block, _ in rows]
    for at in range(0, len(sent), 7):
        part = sent[at : at + 7]
        keys = series_key(np.zeros(len(part), int), np.array([r for r, _, _ in part]))
        table, _ = table.with_rows(
            keys, np.array([b for _, b, _ in part]), np.array([[v for _, _, v in part]], np.float32)
        )
    values, block = table.by_age(0)
    for series, rank in enumerate(table.first.tolist()):
        newest = max(b for r, b in truth if r == rank)
        for age in range(width):
            known = truth.get((rank, newest - age))
            # A block that came after one a whole width newer is gone.
            if block[series, age] >= 0:
                assert block[series, age] == newest - age
                assert values[series, age] == known
            else:
                assert np.isnan(values[series, age])
        assert block[series, 0] == newest


def test_rows_that_are_known_are_no_news_and_the_old_table_stays_as_it_was():
    key = series_key(np.array([0]), np.array([1]))
    first, news = no_history(1, 4).with_rows(key, np.array([3]), np.array([[1.0]], np.float32))
    assert news
    again, news = first.with_rows(key, np.array([3]), np.array([[1.0]], np.float32))
    assert not news
    later, _ = first.with_rows(key, np.array([4]), np.array([[2.0]], np.float32))
    assert first.newest.tolist() == [3]
    assert later.newest.tolist() == [4]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.one_of(st.just(np.nan), st.floats(0, 100))), min_size=1, max_size=25))
def test_the_median_of_the_others(pairs):
    label, values = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])
    result, others = median_of_others(values, label)
    for i in range(len(pairs)):
        rest = [values[j] for j in range(len(pairs)) if j != i and label[j] == label[i] and np.isfinite(values[j])]
        if not np.isfinite(values[i]) or not rest:
            assert np.isnan(result[i])
        else:
            assert others[i] == len(rest)
            assert result[i] == pytest.approx(np.median(rest))


def test_medians_of_rows_over_valid_places():
    values = np.array([[3.0, 1.0, 9.0], [5.0, 7.0, 0.0]])
    valid = np.array([[True, True, False], [False, False, False]])
    assert masked_median(values, valid)[0] == 2.0
    assert np.isnan(masked_median(values, valid)[1])


def test_what_is_usual_among_the_like_is_not_shifted_by_the_slow_ones():
    values = np.array([[1.0], [1.0], [4.0], [4.0], [2.0], [6.0], [5.0]])
    basis, members = basis_of_like(values, np.array([0, 0, 0, 0, 1, 1, 2]))
    assert basis[:, 0].tolist() == [1.0, 1.0, 1.0, 1.0, 6.0, 2.0, 5.0]
    assert members.tolist() == [4, 4, 4, 4, 2, 2, 1]


def test_the_like_are_the_same_stage_of_other_replicas():
    # Two stages, three replicas, no tensor parallelism; a pair of groups for each pipeline edge.
    groups = [Group("dp0", "dp", (0, 1, 2)), Group("dp1", "dp", (3, 4, 5))]
    groups += [Group(f"pp/{a}->{a + 3}", "pp", (a, a + 3)) for a in range(3)]
    groups += [Group(f"pp/{a + 3}->{a}", "pp", (a + 3, a)) for a in range(3)]
    layout = layout_of(tuple(groups), ranks(6))
    series = [(g, r) for g, group in enumerate(groups) for r in group.ranks]
    label = like_labels(layout, np.array([g for g, _ in series]), np.array([r for _, r in series]))
    classes: dict[int, set[tuple[str, int]]] = {}
    for (group, rank), one in zip(series, label.tolist(), strict=True):
        classes.setdefault(one, set()).add((groups[group].name, rank))
    assert {frozenset(members) for members in classes.values()} == {
        frozenset({("dp0", 0), ("dp0", 1), ("dp0", 2)}), frozenset({("dp1", 3), ("dp1", 4), ("dp1", 5)}),
        *(frozenset({(f"pp/{a}->{a + 3}", a + 3 * end) for a in range(3)}) for end in (0, 1)),
        *(frozenset({(f"pp/{a + 3}->{a}", a + 3 * end) for a in range(3)}) for end in (0, 1)),
    }  # fmt: skip


@pytest.mark.parametrize("pattern", [[1], [1, 2], [1, 1, 1, 2], [3, 1, 4, 1, 5]])
def test_the_period_of_a_step(pattern):
    ops = len(pattern)
    times = np.concatenate([step * 200_000_000 + np.arange(ops) * 5_000_000 for step in range(40)])
    assert step_period(times, np.array(pattern * 40)) == pytest.approx(0.2)


def test_equal_operations_are_parted_by_the_pauses_between_them():
    times = np.concatenate([step * 300_000_000 + np.arange(6) * 5_000_000 for step in range(30)])
    assert step_period(times, np.ones(180, int)) == pytest.approx(0.3)


def test_the_period_survives_an_evaluation_and_is_unknown_without_repetition():
    pattern = np.array([1, 2, 3] * 10 + [9, 9] + [1, 2, 3] * 30)
    times = np.arange(len(pattern)) * 100_000_000
    assert step_period(times, pattern) == pytest.approx(0.3)
    assert np.isnan(step_period(np.arange(10), np.arange(10)))
    assert np.isnan(step_period(np.array([1, 2]), np.array([1, 1])))


@pytest.mark.parametrize("seed", range(5))
def test_steps_that_a_busy_host_holds_up_are_no_longer_steps(seed):
    """One operation a step: the long ones among them do not part anything."""
    rng = np.random.default_rng(seed)
    laps = np.full(60, 0.25)
    laps[rng.choice(60, 9, replace=False)] = rng.uniform(1.2, 9.0, 9)
    assert step_period((np.cumsum(laps) * 1e9).astype(np.int64), np.ones(60, int)) == pytest.approx(0.25)


@pytest.mark.parametrize("pattern", [[1], [1, 2, 3]])
def test_what_a_job_does_once_as_it_starts_does_not_hide_the_period(pattern):
    """Else a hang in the first steps after a restart would have to last for half a minute."""
    start = [7, 8, 9, 6]
    signature = np.array(start + pattern * (16 // len(pattern)))
    times = np.arange(len(signature)) * 100_000_000
    assert step_period(times, signature) == pytest.approx(0.1 * len(pattern))


def test_merging_rejects_what_does_not_belong_together():
    one = observation([Group("g", "", (0, 1))], progress([(0, 0, At(1))]))
    other = observation([Group("g", "", (0, 2))], progress([(0, 0, At(1))]))
    with pytest.raises(ValueError, match="'g'"):
        merge([one, other], 0.0)
    with pytest.raises(ValueError, match="no observation"):
        merge([], 0.0)


def test_rows_of_a_group_survive_another_order_of_groups():
    """A merge may number the groups anew at any time: histories go by name."""
    groups = [Group("a", "", (0, 1, 2)), Group("b", "", (3, 4, 5))]
    memory, rng = DiagnosisMemory(), np.random.default_rng(0)
    named = []
    for block in range(30):
        order = groups if block % 2 else groups[::-1]
        rows = []
        for index, group in enumerate(order):
            work = (
                0.03
                * (1 + 0.05 * rng.standard_normal(3))
                * np.where((np.array(group.ranks) == 4) & (block > 20), 2.0, 1.0)
            )
            rows.append(block_rows(index, group.ranks, block, work, work.max() - work + 0.004))
        one = observation(
            [order[0]],
            progress([(0, order[0].ranks[0], At(4 * block))]),
            at_s=0.2 * block,
            processes=ranks(6),
            blocks=rows[0],
        )
        rows[1].group[:] = 0
        two = observation(
            [order[1]],
            progress([(0, order[1].ranks[0], At(4 * block))]),
            at_s=0.2 * block,
            processes=ranks(6),
            blocks=rows[1],
        )
        said, memory = diagnose(merge([one, two], 0.2 * block), memory)
        named += said
    assert [(one.kind, one.culprit.ranks) for one in named] == [(FaultKind.WORK_SLOW, (4,))]


def test_ten_thousand_ranks_in_one_look():
    world = 10_000
    groups = [Group(f"tp{i}", "tp", tuple(range(8 * i, 8 * i + 8))) for i in range(world // 8)]
    rows = [(rank // 8, rank, At(10, 8 * STEP_S)) for rank in range(world) if rank != 4321]
    rows.append((4321 // 8, 4321, At(9, idle_s=8 * STEP_S)))
    rows = [(g, r, at if g == 4321 // 8 else At(10)) for g, r, at in rows]
    said, _ = diagnose(observation(groups, progress(rows), per_node=8), DiagnosisMemory())
    assert [(one.kind, one.culprit.ranks, one.culprit.nodes) for one in said] == [
        (FaultKind.NEVER_ENTERED, (4321,), ("node540",))
    ]
