"""A process that waits for a processor looks hung or slow: on a busy host more proof is asked for."""

from __future__ import annotations

from actors.c4.diagnosis.diagnose import diagnose
from actors.c4.diagnosis.memory import DiagnosisMemory
from actors.c4.diagnosis.observation import Group, ProcessState
from actors.c4.diagnosis.verdict import FaultKind
from tests.actors.c4.diagnosis.builders import SETTINGS, At, Course, observation, progress, ranks

BUSY = 0.008
"""Seconds that a thread waits for a processor; 0.4 ms on a quiet host."""


def slow(block, rank):
    return 2.0 if rank == 2 else 1.0


def test_a_slow_rank_on_a_busy_host_is_named_when_it_stays_slow():
    course = Course()
    course.run(40)
    course.wake_delay_s = {2: BUSY}
    assert course.run(12, work=slow) == []  # 6 blocks do on a quiet host
    (verdict,) = course.run(20, work=slow)
    assert (verdict.kind, verdict.culprit.ranks) == (FaultKind.WORK_SLOW, (2,))
    assert any("The host is busy: its processes wait 8 ms" in said for said in verdict.evidence)
    assert verdict.detection_s < SETTINGS.busy_hold_s


def test_two_short_hold_ups_on_a_busy_host_are_not_a_long_one():
    course = Course()
    course.run(20)
    course.wake_delay_s = {2: BUSY}
    for _ in range(4):
        assert course.run(12, work=slow) == []
        assert course.run(16) == []


def test_another_ranks_busy_host_excuses_nobody():
    course = Course()
    course.run(20)
    course.wake_delay_s = {1: BUSY}
    (verdict,) = course.run(6, work=slow)
    assert verdict.culprit.ranks == (2,)
    assert len(verdict.evidence) == 3


def test_a_stale_heartbeat_is_no_hang_yet_where_the_host_is_busy_but_a_dead_process_is_dead():
    groups = (Group("0", "", (0, 1, 2, 3)),)
    waiting = progress((0, rank, At(9) if rank == 1 else At(10, 1.4)) for rank in range(4))

    def named(**changes):
        memory, kinds = DiagnosisMemory(), []
        for at_s in (100.0, 100.3):
            seen = observation(groups, waiting, at_s=at_s, processes=ranks(4, **changes))
            said, memory = diagnose(seen, memory)
            kinds += [one.kind for one in said]
        return kinds

    stale = {"heartbeat_age_s": {1: 1.4}}
    assert named(**stale) == [FaultKind.HEARTBEAT_LOST]
    assert named(**stale, wake_delay_s={1: BUSY}) == []
    assert named(**stale, wake_delay_s={1: BUSY}, process_state={1: ProcessState.GONE}) == [FaultKind.PROCESS_DEAD]
