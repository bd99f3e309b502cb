"""The diagnosis against the simulator's truth: every fault that leaves a trace is named, and no innocent rank ever is."""

from __future__ import annotations

import random

import pytest

from actors.c4.flight_recorder import Diagnosis, FaultClass, diagnose, from_objects
from tests.actors.c4.flight_recorder.megatron import Layout
from tests.actors.c4.flight_recorder.simulator import Case, Fault, Simulation, simulate

LAYOUTS = (
    Layout(dp=2, tp=2, pp=4),
    Layout(dp=2, tp=2, pp=2),
    Layout(dp=4, tp=2, pp=2),
    Layout(dp=2, tp=4, pp=2, sync_in_layers=False),
    Layout(dp=4, tp=1, pp=2),
    Layout(dp=1, tp=4, pp=2),
    Layout(dp=4, tp=2, pp=1),
    Layout(dp=2, tp=2, pp=2, experts=False),
)


def cases(faults: tuple[Fault, ...], count: int, number: int = 1, **options):
    for seed in range(count):
        kinds = random.Random(seed)
        chosen = {"active_only": seed % 3 != 0, **options}
        try:
            case = simulate(
                LAYOUTS[seed % len(LAYOUTS)],
                [kinds.choice(faults) for _ in range(number)],
                seed,
                **chosen,
            )
        except LookupError:  # the job was over before an operation could be altered
            continue
        yield seed, case, diagnose(from_objects(case.dumps))


def check(seed: int, case: Case, verdict: Diagnosis) -> None:
    named, told = set(verdict.culprit_ranks), set(verdict.culprit_ranks) | set(verdict.suspects)
    assert named <= case.truth, f"seed {seed}: innocent {named - case.truth} named beside {set(case.truth)}"
    no_dump = {rank for rank in case.provable if case.dumps[rank] is None}
    assert case.provable - no_dump <= named, f"seed {seed}: missed {case.provable - named}"
    assert no_dump <= told, f"seed {seed}: missed {no_dump - told}"


@pytest.mark.parametrize("fault", [Fault.HOST_STOP, Fault.HOST_STOP_EMPTY, Fault.KILLED])
def test_one_stopped_or_dead_rank_is_always_named_and_nobody_else(fault: Fault) -> None:
    for seed, case, verdict in cases((fault,), 40):
        assert set(verdict.culprit_ranks) == case.truth, f"seed {seed}"
        assert verdict.fault_class is FaultClass.NON_COMMUNICATION_HANG
        assert not verdict.suspects


@pytest.mark.parametrize("fault", [Fault.SKIP, Fault.OTHER_OP])
def test_a_skipped_or_other_collective_is_laid_to_the_rank_that_differs(fault: Fault) -> None:
    seen = 0
    for seed, case, verdict in cases((fault,), 40):
        seen += 1
        assert set(verdict.culprit_ranks) == case.truth, f"seed {seed}"
        assert verdict.fault_class is FaultClass.COMMUNICATION_HANG
    assert seen > 20


def test_a_dead_device_that_missed_a_completion_is_named() -> None:
    named = 0
    for seed, case, verdict in cases((Fault.GPU_ERROR,), 96):
        check(seed, case, verdict)
        assert case.truth <= set(verdict.culprit_ranks) | set(verdict.suspects), (
            f"seed {seed}: {case.truth} is out of sight"
        )
        named += set(verdict.culprit_ranks) == case.truth
    assert named > 0.8 * 96


def test_a_sleeping_device_is_named_where_starts_are_recorded_and_among_the_suspects_else() -> None:
    for seed, case, verdict in cases((Fault.GPU_SLEEP,), 64, timing=True):
        assert set(verdict.culprit_ranks) == case.truth, f"seed {seed}"
    for seed, case, verdict in cases((Fault.GPU_SLEEP,), 64):
        assert set(verdict.culprit_ranks) <= case.truth, f"seed {seed}"
        assert case.truth <= set(verdict.culprit_ranks) | set(verdict.suspects), f"seed {seed}"


@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize(
    "faults",
    [
        (Fault.HOST_STOP,),
        (Fault.HOST_STOP, Fault.HOST_STOP_EMPTY, Fault.KILLED),
        (Fault.GPU_ERROR,),
        (Fault.HOST_STOP, Fault.GPU_ERROR, Fault.KILLED),
    ],
    ids=["stopped", "stopped or dead", "gpu error", "mixed"],
)
def test_simultaneous_faults_name_no_innocent_and_miss_next_to_none(
    faults: tuple[Fault, ...], number: int, gap: int
) -> None:
    provable = missed = 0
    for seed, case, verdict in cases(faults, 24, number, gap=gap):
        named = set(verdict.culprit_ranks)
        assert named <= case.truth, f"seed {seed}: innocent {named - case.truth} named beside {set(case.truth)}"
        provable += len(case.provable)
        missed += len(case.provable - named - set(verdict.suspects))
    # Two stopped hosts that exchange with one another can each look held up by the other.
    assert missed <= max(1, 0.02 * provable)


def test_a_ring_buffer_that_lost_the_older_records_does_not_change_the_verdict() -> None:
    for seed, case, verdict in cases((Fault.HOST_STOP, Fault.KILLED), 40, buffer=24, active_only=False):
        assert set(verdict.culprit_ranks) == case.truth, f"seed {seed}"


def test_a_job_that_ends_is_healthy() -> None:
    for layout in LAYOUTS:
        simulation = Simulation(layout, seed=1)
        simulation.run()
        for active_only in (True, False):
            dumps = {rank: simulation.dump(rank, active_only) for rank in range(layout.world)}
            verdict = diagnose(from_objects(dumps))
            assert verdict.fault_class is FaultClass.HEALTHY
            assert verdict.culprit_ranks == ()
