"""Slowness of work and connections against their like and their own past; noise, pauses and what slows all are nobody's fault."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.c4.diagnosis.connections import delay_matrix
from actors.c4.diagnosis.diagnose import diagnose
from actors.c4.diagnosis.memory import DiagnosisMemory
from actors.c4.diagnosis.observation import Group, concat
from actors.c4.diagnosis.verdict import FaultClass, FaultKind
from tests.actors.c4.diagnosis.builders import At, Course, block_rows, link_block_rows, observation, progress, ranks


@pytest.mark.parametrize("factor", [1.5, 2.0, 4.0])
def test_the_rank_that_others_wait_for_is_named_within_a_few_blocks(factor):
    course = Course()
    assert course.run(20) == []
    verdicts = course.run(10, work=lambda block, rank: factor if rank == 2 else 1.0)
    (verdict,) = verdicts
    assert (verdict.kind, verdict.culprit.ranks) == (FaultKind.WORK_SLOW, (2,))
    assert verdict.fault_class is FaultClass.NON_COMMUNICATION_SLOW
    assert verdict.slowdown == pytest.approx(factor, rel=0.2)
    assert 0 < verdict.detection_s < 10 * 4 * 0.05 * factor


def test_a_rank_that_something_holds_up_for_half_a_second_is_not_slow():
    course = Course()
    course.run(20)
    for _ in range(5):
        assert course.run(3, work=lambda block, rank: 2.5 if rank == 2 else 1.0) == []
        assert course.run(12) == []


@pytest.mark.parametrize(("factor", "blocks"), [(1.5, 32), (3.0, 12)])
def test_a_slow_connection_is_a_hot_cell(factor, blocks):
    course = Course()
    assert course.run(20) == []
    (verdict,) = course.run(blocks, transfer=lambda block, pair: factor if pair == (1, 2) else 1.0)
    assert (verdict.kind, verdict.culprit.link) == (FaultKind.LINK_SLOW, (1, 2))
    assert verdict.fault_class is FaultClass.COMMUNICATION_SLOW
    assert verdict.culprit.nodes == ("node1", "node2")


def test_a_connection_that_costs_a_few_percent_of_the_step_is_named_only_when_it_lasts():
    course = Course()
    course.run(20)
    trifle = {
        "transfer": lambda block, pair: 1.5 if pair == (1, 2) else 1.0
    }  # 1 ms of the 38 ms between two operations
    assert course.run(5, **trifle) == []
    assert course.run(40) == []
    (verdict,) = course.run(24, **trifle)
    assert verdict.culprit.link == (1, 2)


def test_both_faults_at_once_are_both_named():
    course = Course()
    course.run(20)
    said = course.run(
        8, lambda block, rank: 2.0 if rank == 0 else 1.0, lambda block, pair: 2.5 if pair == (1, 2) else 1.0
    )
    assert {(one.kind, one.culprit.ranks, one.culprit.link) for one in said} == {
        (FaultKind.WORK_SLOW, (0,), None), (FaultKind.LINK_SLOW, (), (1, 2)),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_noise_and_lasting_differences_never_alarm(seed):
    course = Course(noise=0.15, seed=seed)
    lasting = np.random.default_rng(seed).uniform(0.85, 1.15, 8)
    assert course.run(150, lambda block, rank: lasting[rank], lambda block, pair: lasting[4 + pair[0]]) == []


def test_what_slows_all_is_nobodys_fault():
    course = Course()
    course.run(20)
    assert course.run(20, lambda block, rank: 2.5, lambda block, pair: 2.5) == []


def test_pauses_of_one_rank_never_alarm():
    course = Course()
    course.run(12)
    # Garbage collection or a checkpoint on rank 0: five steps' worth in one operation, every few blocks.
    assert course.run(60, work=lambda block, rank: 6.0 if rank == 0 and block % 5 == 0 else 1.0) == []


def test_the_first_blocks_teach_nothing():
    course = Course()
    # Compilation: ranks differ wildly in the first two blocks, and agree from then on.
    assert course.run(30, work=lambda block, rank: 30.0 * (1 + rank) if block < 2 else 1.0) == []


def test_slow_from_the_beginning_is_found_by_its_like():
    course = Course(world=6)
    (verdict,) = course.run(20, work=lambda block, rank: 2.2 if rank == 4 else 1.0)
    assert (verdict.kind, verdict.culprit.ranks) == (FaultKind.WORK_SLOW, (4,))


def test_what_was_named_is_not_named_again_while_it_lasts():
    course = Course()
    course.run(20)
    assert len(course.run(10, work=lambda block, rank: 2.0 if rank == 1 else 1.0)) == 1
    assert course.run(40, work=lambda block, rank: 2.0 if rank == 1 else 1.0) == []


def test_who_is_slower_and_holds_nobody_up_is_left_alone():
    """Own work doubles, yet mates do not wait for it any longer than it waits itself."""
    memory, group = DiagnosisMemory(), (Group("0", "", (0, 1, 2, 3)),)
    rng = np.random.default_rng(0)
    for block in range(40):
        work = 0.03 * (1 + 0.05 * rng.standard_normal(4)) * (np.array([1, 1, 2, 1]) if block > 20 else 1)
        seen = observation(
            group, progress((0, r, At(4 * block)) for r in range(4)), at_s=block * 0.4,
            blocks=block_rows(0, range(4), block, work, np.full(4, 0.05)),
        )  # fmt: skip
        said, memory = diagnose(seen, memory)
        assert said == ()


def test_an_expert_groups_imbalance_convicts_nobody():
    groups = (Group("e", "ep", tuple(range(8))),)
    memory, rng = DiagnosisMemory(), np.random.default_rng(1)
    for block in range(60):
        load = (
            0.02 * np.exp(0.4 * rng.standard_normal(8)) * (np.where(np.arange(8) == 3, 3.0, 1.0) if block > 30 else 1)
        )
        seen = observation(
            groups, progress((0, r, At(4 * block)) for r in range(8)), at_s=block * 0.3,
            blocks=block_rows(0, range(8), block, load, load.max() - load + 0.004),
        )  # fmt: skip
        said, memory = diagnose(seen, memory)
        assert said == ()


class Grid:
    """Ranks 0 ... 2n-1 on nodes of two, in rings of even and odd ranks, and pairs across: each sends to two other nodes."""

    def __init__(self, nodes: int = 6, seed: int = 0):
        n = 2 * nodes
        self.groups = [Group("even", "dp", tuple(range(0, n, 2))), Group("odd", "dp", tuple(range(1, n, 2)))]
        self.pairs: list[list[tuple[int, int]]] = []
        for group in self.groups:
            members = group.ranks
            self.pairs.append([(a, members[(i + 1) % len(members)]) for i, a in enumerate(members)])
        jump = [(a, (a + 4) % n) for a in range(n)]
        self.groups += [Group(f"x/{a}->{b}", "pp", (a, b)) for a, b in jump]
        self.pairs += [[pair] for pair in jump]
        self.rng, self.memory, self.block, self.world = np.random.default_rng(seed), DiagnosisMemory(), 0, n

    def run(self, blocks: int, slow=lambda a, b: 1.0):
        named = []
        for _ in range(blocks):
            blocks_, link_blocks = [], []
            for index, (group, pairs) in enumerate(zip(self.groups, self.pairs, strict=True)):
                seconds = [0.01 * slow(a, b) * (1 + 0.08 * self.rng.standard_normal()) for a, b in pairs]
                blocks_.append(
                    block_rows(
                        index, group.ranks, self.block, np.full(len(group.ranks), 0.02), np.full(len(group.ranks), 0.01)
                    )
                )
                link_blocks.append(link_block_rows(index, pairs, self.block, seconds, 1 << 20))
            seen = observation(
                self.groups, progress((0, r, At(4 * self.block)) for r in self.groups[0].ranks), at_s=0.4 * self.block,
                processes=ranks(self.world, 2), blocks=concat(blocks_), link_blocks=concat(link_blocks),
            )  # fmt: skip
            said, self.memory = diagnose(seen, self.memory)
            named += said
            self.block += 1
        return [(one.kind, one.culprit.ranks, one.culprit.link) for one in named]


@pytest.mark.parametrize(
    "slow, expected",
    [
        (lambda a, b: 2.0 if (a, b) == (2, 4) else 1.0, (FaultKind.LINK_SLOW, (), (2, 4))),
        (lambda a, b: 2.0 if a == 5 else 1.0, (FaultKind.SENDER_SLOW, (5,), None)),
        (lambda a, b: 2.0 if b == 5 else 1.0, (FaultKind.RECEIVER_SLOW, (5,), None)),
        (lambda a, b: 2.0 if a in (4, 5) else 1.0, (FaultKind.SENDER_SLOW, (4, 5), None)),
        (lambda a, b: 2.0 if b in (6, 7) else 1.0, (FaultKind.RECEIVER_SLOW, (6, 7), None)),
    ],
    ids=["cell", "row", "column", "row of a node", "column of a node"],
)
def test_cells_rows_and_columns_of_the_delay_matrix(slow, expected):
    grid = Grid()
    assert grid.run(16) == []
    assert grid.run(14, slow) == [expected]


def test_a_slow_link_and_a_slow_receiver_elsewhere():
    grid = Grid(nodes=8)
    grid.run(16)
    said = grid.run(14, lambda a, b: 2.5 if (a, b) == (0, 2) or b == 11 else 1.0)
    assert sorted(said, key=str) == sorted(
        [(FaultKind.LINK_SLOW, (), (0, 2)), (FaultKind.RECEIVER_SLOW, (11,), None)], key=str
    )


def test_the_delay_matrix_is_seconds_per_mebibyte():
    rows = link_block_rows(0, [(0, 1), (1, 0), (0, 1)], 0, [0.5, 0.25, 1.5], 1 << 20)
    group = (Group("0", "", (0, 1)),)
    matrix = delay_matrix(observation(group, progress([(0, 0, At(1))]), link_blocks=rows), 3)
    assert matrix[0, 1] == pytest.approx(1.0)
    assert matrix[1, 0] == pytest.approx(0.25)
    assert np.isnan(matrix[2]).all()
    assert np.isnan(matrix[0, 0])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 4), st.integers(0, 1000))
def test_the_culprit_is_found_wherever_it_sits(culprit, seed):
    course = Course(world=5, seed=seed)
    course.run(14)
    assert [one.culprit.ranks for one in course.run(7, work=lambda block, rank: 1.8 if rank == culprit else 1.0)] == [
        (culprit,)
    ]
