"""Simulated faults of every kind, judged by the real diagnosis through the nodes' reports and the master's merge."""

from __future__ import annotations

import numpy as np
import pytest

from actors.c4.diagnosis.verdict import Culprit, FaultKind, Verdict
from apps.c4.fleet.campaign import Plan, run_campaign, wilson
from apps.c4.fleet.faults import FleetFault, Injected, draw_fault
from apps.c4.fleet.shape import Shape
from apps.c4.fleet.trial import HealthyJob, Trial, run_trials

SHAPE = Shape(data=4, tensor=8, pipeline=4, micro_batches=4)


@pytest.fixture(scope="module")
def job():
    return HealthyJob(SHAPE, seed=1)


def test_healthy_steps_with_pauses_alarm_nobody(job):
    assert job.false_alarms == []
    assert job.memory.step_s == pytest.approx(job.step_s, rel=0.1)


@pytest.mark.parametrize("kind", list(Injected), ids=[kind.name for kind in Injected])
def test_every_kind_of_fault_is_named_with_its_culprit(job, kind):
    rng = np.random.default_rng([7, list(Injected).index(kind)])
    faults = [[draw_fault(SHAPE, rng, kind)] for _ in range(3)]
    for trial in run_trials(job, faults, seed=3, through_nodes=True):
        assert trial.right, (str(trial.faults[0]), trial.verdicts)
        assert max(trial.detection_s) < 8 * trial.step_s * max(1.0, trial.faults[0].factor)


def test_a_slow_rank_before_a_hang_elsewhere(job):
    pair = (FleetFault(Injected.WORK_SLOW, (3,), factor=2.0), FleetFault(Injected.STUCK, (70,), wave=3))
    (trial,) = run_trials(job, [pair], seed=4)
    assert trial.right, trial.verdicts


def test_a_rank_that_never_begins_the_step_is_named(job):
    (trial,) = run_trials(job, [[FleetFault(Injected.STUCK, (37,), wave=0)]], seed=6)
    assert trial.right, trial.verdicts
    assert trial.onsets_s[0] > job.clock.free.min()


def test_without_a_fault_nothing_is_named(job):
    (trial,) = run_trials(job, [[FleetFault(Injected.WORK_SLOW, (3,), factor=1.0)]], seed=5)
    assert trial.verdicts == ()


def test_a_campaign_is_deterministic_and_counts_right():
    plan = Plan(ranks=64, faults=4, seed=2, trials_per_job=2, side_by_side=2)
    first, again = run_campaign(plan), run_campaign(plan)
    assert first.trials == again.trials
    assert len(first.trials) == 4
    assert sum(first.confusion().values()) == 4
    assert first.accuracy == (first.right - len(first.false_alarms)) / 4


def test_what_is_not_the_fault_is_not_right():
    fault = FleetFault(Injected.WORK_SLOW, (3,), factor=2.0)

    def verdict(*ranks, kind=FaultKind.WORK_SLOW):
        return Verdict(kind, Culprit(ranks), ("",), 0.9, 1.0, 2.0)

    def right(*said):
        return Trial((fault,), said, 1.0, (0.5,)).right

    assert right(verdict(3))
    assert not right()
    assert not right(verdict(4))
    assert not right(verdict(3, kind=FaultKind.SENDER_SLOW))
    assert not right(verdict(3), verdict(4))


def test_the_interval_of_a_share():
    low, high = wilson(990, 1000)
    assert low == pytest.approx(0.9817, abs=1e-3)  # worked by hand from Wilson's formula
    assert high == pytest.approx(0.9946, abs=1e-3)
    assert wilson(0, 0) == (0.0, 1.0)
