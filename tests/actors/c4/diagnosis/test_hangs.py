"""Hangs: who is named, why, and who is not. By heartbeat first, then count of operations, then their kind, then bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.c4.diagnosis.diagnose import diagnose
from actors.c4.diagnosis.memory import DiagnosisMemory
from actors.c4.diagnosis.observation import Group, ProcessState
from actors.c4.diagnosis.verdict import FaultClass, FaultKind
from actors.c4.diagnosis.waits import waiting_edges
from actors.c4.recorder.records import ElementType, OpType
from tests.actors.c4.diagnosis.builders import STEP_S, At, later, links, look, observation, progress, ranks

WORLD = (Group("0", "", (0, 1, 2, 3)),)
WAITED = 8 * STEP_S


def waiting_for(rank: int, seconds: float = WAITED, **absent) -> list[tuple[int, int, At]]:
    """All but ``rank`` are inside operation 10."""
    rows = [(0, other, At(10, seconds)) for other in range(4) if other != rank]
    return [*rows, (0, rank, At(9, **{"idle_s": seconds + 0.02} | absent))]


def named(seen, memory=None):
    return [(one.kind, one.culprit.ranks, one.culprit.link) for one in look(seen, memory)]


def test_who_has_not_entered_is_named_with_the_evidence():
    (verdict,) = look(observation(WORLD, progress(waiting_for(2))))
    assert verdict.kind is FaultKind.NEVER_ENTERED
    assert verdict.fault_class is FaultClass.NON_COMMUNICATION_HANG
    assert verdict.culprit.ranks == (2,)
    assert verdict.culprit.nodes == ("node2",)
    assert verdict.group == "0"
    assert verdict.sequence == 10
    assert 100.0 - WAITED - 0.1 <= verdict.onset_s <= 100.0 - WAITED + 0.1
    assert "rank 2 has not entered it" in verdict.evidence[0]


@pytest.mark.parametrize("steps", [0.5, 2, 5])
def test_a_pause_of_up_to_five_steps_is_no_hang(steps):
    seconds = steps * STEP_S
    assert named(observation(WORLD, progress(waiting_for(2, seconds)))) == []
    everybody_idle = [(0, rank, At(9, idle_s=50.0)) for rank in range(4)]
    assert named(observation(WORLD, progress(everybody_idle))) == []


def test_before_the_step_is_known_it_takes_half_a_minute():
    unknown = ranks(4, step_s=dict.fromkeys(range(4), np.nan))
    assert named(observation(WORLD, progress(waiting_for(1, 20.0)), processes=unknown)) == []
    assert named(observation(WORLD, progress(waiting_for(1, 31.0)), processes=unknown)) == [
        (FaultKind.NEVER_ENTERED, (1,), None)
    ]


def test_longer_steps_are_given_longer():
    slow = ranks(4, step_s=dict.fromkeys(range(4), 10.0))
    assert named(observation(WORLD, progress(waiting_for(1, 50.0)), processes=slow)) == []
    assert named(observation(WORLD, progress(waiting_for(1, 56.0)), processes=slow)) == [
        (FaultKind.NEVER_ENTERED, (1,), None)
    ]


def test_who_waits_in_another_group_is_innocent():
    # 3 is stuck; 2 waits for it in "b"; 0 and 1 wait for 2 in "a".
    groups = (Group("a", "dp", (0, 1, 2)), Group("b", "tp", (2, 3)))
    rows = [(0, 0, At(5, 1.5)), (0, 1, At(5, 1.5)), (0, 2, At(4)), (1, 2, At(7, 1.6)), (1, 3, At(6, idle_s=1.7))]
    seen = observation(groups, progress(rows))
    assert named(seen) == [(FaultKind.NEVER_ENTERED, (3,), None)]
    assert waiting_edges(seen) == ((0, 2), (1, 2), (2, 3))


def test_who_has_only_just_come_free_is_innocent():
    assert named(observation(WORLD, progress(waiting_for(2, WAITED, idle_s=0.05)))) == []


def test_a_member_without_any_record_is_named_if_its_process_is_known():
    rows = [(0, rank, At(1, WAITED)) for rank in (0, 1, 2)]
    assert named(observation(WORLD, progress(rows))) == [(FaultKind.NEVER_ENTERED, (3,), None)]


@pytest.mark.parametrize(
    "state, kind, looks",
    [(ProcessState.GONE, FaultKind.PROCESS_DEAD, 1), (ProcessState.STOPPED, FaultKind.PROCESS_STOPPED, 2)],
)
def test_a_process_that_is_gone_or_stopped_is_named_at_once(state, kind, looks):
    seen = observation(
        WORLD, progress(waiting_for(2, 0.1)), processes=ranks(4, process_state={2: state}, heartbeat_age_s={2: 0.2})
    )
    memory = DiagnosisMemory()
    for number in range(1, 4):
        verdicts, memory = diagnose(later(seen, 0.2 * number), memory)
        assert [one.kind for one in verdicts] == ([kind] if number == looks else [])
        if verdicts:
            assert verdicts[0].culprit.ranks == (2,)
            assert verdicts[0].onset_s <= verdicts[0].found_s - 0.2 + 1e-6


def test_an_instant_of_being_stopped_is_a_debugger():
    stopped = observation(
        WORLD, progress(waiting_for(2, 0.1)), processes=ranks(4, process_state={2: ProcessState.STOPPED})
    )
    verdicts, memory = diagnose(stopped, DiagnosisMemory())
    assert not verdicts
    assert not diagnose(later(observation(WORLD, progress(waiting_for(2, 0.1))), 0.3), memory)[0]


def test_a_stale_heartbeat_with_peers_waiting_is_a_locked_interpreter_whatever_the_operation_says():
    stale = ranks(4, heartbeat_age_s={1: 1.4})
    inside = [(0, rank, At(10, 1.3)) for rank in range(4)]
    for rows in (waiting_for(1, 1.3), inside):
        assert named(observation(WORLD, progress(rows), processes=stale)) == [(FaultKind.HEARTBEAT_LOST, (1,), None)]


def test_a_stale_heartbeat_excuses_its_group_before_it_is_named_itself():
    stale = ranks(4, heartbeat_age_s={1: 0.8})
    assert named(observation(WORLD, progress((0, rank, At(10, 1.3)) for rank in range(4)), processes=stale)) == []


def test_a_silent_node_is_lost_when_its_peers_wait_and_not_when_the_job_moves_on():
    silent = ranks(4, 2, report_age_s={2: 2.0, 3: 2.0})
    blocked = [(0, 0, At(10, 1.8)), (0, 1, At(10, 1.8)), (0, 2, At(9)), (0, 3, At(9))]
    (verdict,) = look(observation(WORLD, progress(blocked), processes=silent))
    assert verdict.kind is FaultKind.NODE_LOST
    assert verdict.culprit.ranks == (2, 3)
    assert verdict.culprit.nodes == ("node1",)
    moving = [(0, rank, At(10 + 5 * (rank < 2), 0.02)) for rank in range(4)]
    assert named(observation(WORLD, progress(moving), processes=silent)) == []


def test_a_node_that_the_cluster_has_lost_needs_no_further_sign():
    gone = ranks(4, 2, report_age_s={0: np.inf, 1: np.inf})
    assert named(observation(WORLD, progress((0, r, At(9)) for r in range(4)), processes=gone)) == [
        (FaultKind.NODE_LOST, (0, 1), None)
    ]


def test_the_minority_in_another_operation_is_named_soon():
    rows = [(0, rank, At(10, 0.5)) for rank in (0, 1, 3)] + [(0, 2, At(10, 0.5, size=1024))]
    (verdict,) = look(observation(WORLD, progress(rows)))
    assert (verdict.kind, verdict.culprit.ranks) == (FaultKind.MISMATCHED_COLLECTIVE, (2,))
    assert "1024 bytes" in verdict.evidence[0]
    other_kind = [(0, rank, At(10, 0.5)) for rank in (0, 1, 3)] + [(0, 2, At(10, 0.5, kind=OpType.BROADCAST))]
    other_type = [(0, rank, At(10, 0.5)) for rank in (0, 1, 3)] + [(0, 2, At(10, 0.5, dtype=ElementType.FLOAT64))]
    for rows in (other_kind, other_type):
        assert named(observation(WORLD, progress(rows))) == [(FaultKind.MISMATCHED_COLLECTIVE, (2,), None)]


def test_of_two_that_differ_both_are_named_with_less_confidence():
    pair = (Group("p", "", (0, 1)),)
    (verdict,) = look(observation(pair, progress([(0, 0, At(3, 0.6)), (0, 1, At(3, 0.6, kind=OpType.BARRIER))])))
    assert verdict.culprit.ranks == (0, 1)
    assert verdict.confidence <= 0.5


def test_operations_whose_sizes_may_differ_are_compared_by_kind_only():
    rows = [(0, rank, At(10, 0.6, kind=OpType.ALL_TO_ALL, size=100 * rank + 1)) for rank in range(4)]
    assert named(observation(WORLD, progress(rows))) == []
    pair = (Group("0/0->1", "pp", (0, 1)),)
    assert (
        named(observation(pair, progress([(0, 0, At(3, 0.6, kind=OpType.SEND)), (0, 1, At(3, 0.6, kind=OpType.RECV))])))
        == []
    )


RING = [(0, 1), (1, 2), (2, 3), (3, 0)]


def stalled(counts, age=WAITED, open_s=WAITED):
    rows = [(a, b, 10, *counts[a, b], age) for a, b in RING]
    return observation(WORLD, progress((0, rank, At(10, open_s)) for rank in range(4)), links=links(rows))


def test_the_connection_that_took_a_message_and_did_not_deliver_it_is_stalled_and_starved_ones_are_not():
    seen = stalled({(0, 1): (4, 4), (1, 2): (3, 2), (2, 3): (3, 3), (3, 0): (4, 4)})
    (verdict,) = look(seen)
    assert (verdict.kind, verdict.culprit.link) == (FaultKind.LINK_STALLED, (1, 2))
    assert verdict.culprit.nodes == ("node1", "node2")
    assert verdict.fault_class is FaultClass.COMMUNICATION_HANG


def test_two_stalled_connections_are_both_named():
    seen = stalled({(0, 1): (4, 3), (1, 2): (3, 3), (2, 3): (5, 4), (3, 0): (4, 4)})
    assert [link for _, _, link in named(seen)] == [(0, 1), (2, 3)]


def test_a_sender_that_keeps_what_it_could_pass_on_is_found_by_its_supply():
    seen = stalled({(0, 1): (6, 6), (1, 2): (2, 2), (2, 3): (3, 3), (3, 0): (4, 4)})
    assert named(seen) == [(FaultKind.LINK_STALLED, (), (1, 2))]


def test_an_operation_whose_bytes_still_move_is_no_hang():
    assert named(stalled(dict.fromkeys(RING, (3, 2)), age=0.1)) == []


def test_without_connections_the_group_is_named():
    rows = [(0, rank, At(10, WAITED)) for rank in range(4)]
    assert named(observation(WORLD, progress(rows))) == [(FaultKind.GROUP_STALLED, (0, 1, 2, 3), None)]


def test_a_receive_whose_sender_has_sent_is_a_stalled_connection():
    pair = (Group("0/0->1", "pp", (0, 1)),)
    rows = [(0, 0, At(7, idle_s=1.5, kind=OpType.SEND)), (0, 1, At(7, 1.5, kind=OpType.RECV))]
    assert named(observation(pair, progress(rows))) == [(FaultKind.LINK_STALLED, (), (0, 1))]


def test_who_waits_for_bytes_of_an_older_operation_holds_the_others_up_and_is_innocent():
    # 3 never got the last message of 9; the others are in 10 and wait for 3.
    rows = [(0, rank, At(10, 1.4)) for rank in range(3)] + [(0, 3, At(9, 1.5))]
    moved = links([(0, 1, 9, 6, 6, 1.5), (1, 2, 9, 6, 6, 1.5), (2, 3, 9, 6, 5, 1.5), (3, 0, 9, 6, 6, 1.5)])
    assert named(observation(WORLD, progress(rows), links=moved)) == [(FaultKind.LINK_STALLED, (), (2, 3))]


def test_a_fault_is_named_once_and_keeps_its_onset():
    memory, seen = DiagnosisMemory(), observation(WORLD, progress(waiting_for(2, 1.05)))
    first, memory = diagnose(seen, memory)
    assert len(first) == 1
    for number in range(1, 20):
        again, memory = diagnose(later(seen, 0.2 * number), memory)
        assert again == ()
    # The same rank, stopped now: all hangs of a rank are one.
    stopped = replace(later(seen, 5.0), ranks=ranks(4, process_state={2: ProcessState.STOPPED}))
    for number in (0.0, 0.3):
        again, memory = diagnose(later(stopped, number), memory)
        assert again == ()


def test_another_generation_begins_anew():
    seen = observation(WORLD, progress(waiting_for(2)))
    _, memory = diagnose(seen, DiagnosisMemory())
    again, _ = diagnose(replace(seen, generation=2), memory)
    assert [one.culprit.ranks for one in again] == [(2,)]


def test_a_wait_that_ended_well_teaches_patience_but_not_much():
    memory = DiagnosisMemory()
    begin = observation(WORLD, progress(waiting_for(2, 0.02)))
    for seconds in (0.5, 0.9):
        _, memory = diagnose(later(begin, seconds), memory)
    _, memory = diagnose(observation(WORLD, progress((0, r, At(30)) for r in range(4)), at_s=102.0), memory)
    assert 1.0 < memory.hang_s <= 1.5


def test_deaths_after_a_death_are_its_consequences():
    memory = DiagnosisMemory()
    first = observation(WORLD, progress(waiting_for(2, 0.1)), processes=ranks(4, process_state={2: ProcessState.GONE}))
    verdicts, memory = diagnose(first, memory)
    assert [one.culprit.ranks for one in verdicts] == [(2,)]
    rest = ranks(4, process_state=dict.fromkeys(range(4), ProcessState.GONE))
    verdicts, memory = diagnose(replace(later(first, 2.0), ranks=rest), memory)
    assert verdicts == ()


@st.composite
def programs(draw):
    """A random job: groups, the operations that they run in order, and where some ranks stop for good."""
    world = draw(st.integers(3, 8))
    count = draw(st.integers(1, 5))
    groups = [tuple(sorted(draw(st.sets(st.integers(0, world - 1), min_size=2, max_size=world)))) for _ in range(count)]
    order = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=25))
    stops = draw(st.dictionaries(st.integers(0, world - 1), st.integers(0, 12), min_size=1, max_size=2))
    return world, groups, order, stops


@settings(max_examples=250, deadline=None)
@given(programs())
def test_the_named_are_exactly_the_roots_that_hold_somebody_up(program):
    world, groups, order, stops = program
    todo = {
        rank: [(group, order[: at + 1].count(group)) for at, group in enumerate(order) if rank in groups[group]]
        for rank in range(world)
    }
    done = dict.fromkeys(range(world), 0)
    inside: dict[int, tuple[int, int]] = {}
    entered = {(group, rank): 0 for group, members in enumerate(groups) for rank in members}
    moved = True
    while moved:  # brute force: everybody goes as far as it can
        moved = False
        for rank in range(world):
            if rank not in inside and done[rank] < len(todo[rank]) and done[rank] != stops.get(rank):
                inside[rank] = todo[rank][done[rank]]
                entered[inside[rank][0], rank] += 1
                moved = True
        for group, members in enumerate(groups):
            if (
                all(rank in inside and inside[rank][0] == group for rank in members)
                and len({inside[rank] for rank in members}) == 1
            ):
                for rank in members:
                    done[rank] += 1
                    del inside[rank]
                moved = True
    roots = {
        rank for rank in stops for group, number in inside.values()
        if rank not in inside and rank in groups[group] and entered[group, rank] < number
    }  # fmt: skip
    rows = [
        (group, rank, At(count, WAITED if rank in inside and inside[rank][0] == group else None, idle_s=WAITED))
        for (group, rank), count in entered.items()
    ]
    job = [Group(f"g{index}", "", members) for index, members in enumerate(groups)]
    processes = ranks(1 + max(rank for members in groups for rank in members))
    said = look(observation(job, progress(rows), processes=processes))
    assert {one.culprit.ranks for one in said} == {(rank,) for rank in roots}
    assert all(one.kind is FaultKind.NEVER_ENTERED for one in said)


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(6)), st.floats(-1e6, 1e6), st.integers(0, 5))
def test_renaming_ranks_renames_the_culprit_and_the_clock_does_not_matter(order, offset, culprit):
    rows = [(0, order[rank], At(10, WAITED) if rank != culprit else At(9, idle_s=WAITED)) for rank in range(6)]
    group = (Group("0", "", tuple(order)),)
    (verdict,) = look(observation(group, progress(rows), at_s=100.0 + offset))
    assert verdict.culprit.ranks == (order[culprit],)
    assert verdict.detection_s == pytest.approx(WAITED, abs=0.05)
