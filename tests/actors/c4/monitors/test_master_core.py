"""What the master decides, told as a story of reports and times; the diagnosis is a stand-in that says what the test wants."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from actors.c4.diagnosis.verdict import Culprit, FaultKind, Verdict
from actors.c4.generation import Generation
from actors.c4.monitors.master_core import MasterCore, key_of
from actors.c4.monitors.settings import MonitorSettings
from actors.c4.ports import CLEARED, Fence, Report, Stack
from actors.c4.recovery.policy import Action, Decision
from tests.actors.c4.monitors.rows import generation, observation


@dataclass
class ScriptedJudge:
    """Names what stands in ``now``, once; ``seen`` is what it still sees."""

    now: list[Verdict] = field(default_factory=list)
    seen: dict[Any, float] = field(default_factory=dict)
    looks: list[Any] = field(default_factory=list)

    def look(self, observation: Any, memory: Any) -> tuple[tuple[Verdict, ...], Any]:
        self.looks.append(observation)
        named, self.now = tuple(self.now), []
        return named, memory

    def standing(self, memory: Any) -> dict[Any, float]:
        return self.seen


@dataclass
class ScriptedPolicy:
    action: Action = Action.EVICT
    quarantine: bool = True
    asked: list[Any] = field(default_factory=list)

    def __call__(self, verdict: Verdict, situation: Any) -> Decision:
        self.asked.append(situation)
        return Decision(self.action, "the test says so", quarantine=self.quarantine)


def verdict(kind: FaultKind = FaultKind.PROCESS_STOPPED, rank: int = 2, link: tuple[int, int] | None = None) -> Verdict:
    culprit = Culprit((rank,) if link is None else (), link)
    return Verdict(kind, culprit, ("it stands still",), 0.99, onset_s=9.0, found_s=10.0)


@pytest.fixture
def judge() -> ScriptedJudge:
    return ScriptedJudge()


@pytest.fixture
def policy() -> ScriptedPolicy:
    return ScriptedPolicy()


@pytest.fixture
def core(judge: ScriptedJudge, policy: ScriptedPolicy) -> MasterCore:
    made = MasterCore("run", MonitorSettings(), judge, policy)
    made.begin_generation(generation(1), 0.0)
    return made


def push(core: MasterCore, node: str, now_s: float, number: int = 1, **changes: Any):
    ranks = (0, 1) if node == "n0" else (2, 3)
    report = Report(node, incarnation=changes.pop("incarnation", 1.0), packed=b"x" * 100, **changes)
    return core.observe(report, observation(node, ranks, generation=number), now_s)


def both(core: MasterCore, now_s: float, number: int = 1) -> None:
    push(core, "n0", now_s, number)
    push(core, "n1", now_s, number)


# ---- generations and fencing


def test_agents_learn_from_the_answer_whom_to_watch(core: MasterCore) -> None:
    orders = core.observe(Report("n1", 1.0, b""), None, 0.0)
    assert orders.generation == 1
    assert [worker.rank for worker in orders.workers] == [2, 3]
    assert core.observe(Report("elsewhere", 1.0, b""), None, 0.0).workers == ()


def test_rows_of_an_older_generation_are_refused(core: MasterCore) -> None:
    core.begin_generation(generation(2, first_pid=200), 1.0)
    assert not push(core, "n0", 1.1, number=1).accepted
    assert core.observation(1.2) is None
    assert push(core, "n0", 1.3, number=2).accepted


def test_a_number_must_grow(core: MasterCore) -> None:
    core.begin_generation(generation(1), 0.5)  # told again: nothing happens
    with pytest.raises(ValueError, match="cannot begin after generation 1"):
        core.begin_generation(generation(1, first_pid=900), 1.0)


def test_what_is_left_of_the_last_generation_is_killed_when_the_next_begins(core: MasterCore) -> None:
    push(core, "n1", 0.5, started=((102, 7000), (103, 7001)))
    core.begin_generation(generation(2, first_pid=200), 1.0)
    kill = push(core, "n1", 1.1, number=2).kill
    assert set(kill) == {Fence(1, 102, 7000), Fence(1, 103, 7001)}, (
        "with the start times, so that no later process is hit"
    )
    assert push(core, "n1", 1.2, number=2, gone=(Fence(1, 102, 7000),)).kill == (Fence(1, 103, 7001),)
    assert core.fences_left() == 3


def test_a_worker_that_bears_an_old_workers_pid_lives(core: MasterCore) -> None:
    core.begin_generation(generation(2), 1.0)  # the same pids
    assert push(core, "n0", 1.1, number=2).kill == ()


def test_a_fence_can_be_asked_for(core: MasterCore, judge: ScriptedJudge) -> None:
    core.request_fence(1)
    assert {fence.pid for fence in push(core, "n0", 1.0).kill} == {100, 101}
    judge.now = [verdict()]
    both(core, 1.1)
    assert core.judge(1.2, 0.0) == (), "deaths that follow are ours"


# ---- verdicts


def test_an_evicted_fault_quarantines_its_node_and_condemns_the_generation(
    core: MasterCore, judge: ScriptedJudge
) -> None:
    both(core, 10.0)
    judge.now = [verdict(rank=2)]
    (one,) = core.judge(10.0, 1e9)
    assert (one.number, one.action, one.generation, one.repeats) == (1, "evict", 1, 0)
    assert one.nodes == ("n1",)
    assert one.verdict.culprit.nodes == ("host-1",), "people read names"
    assert list(core.quarantine) == ["n1"]
    assert {fence.pid for node in ("n0", "n1") for fence in push(core, node, 10.1).kill} == {100, 101, 102, 103}
    judge.now = [verdict(FaultKind.PROCESS_DEAD, 0)]
    assert core.judge(10.2, 1e9) == (), "a condemned generation is judged no more"


def test_the_programs_own_fault_quarantines_nothing(
    core: MasterCore, judge: ScriptedJudge, policy: ScriptedPolicy
) -> None:
    policy.quarantine = False
    both(core, 10.0)
    judge.now = [verdict(FaultKind.MISMATCHED_COLLECTIVE)]
    core.judge(10.0, 0.0)
    assert core.quarantine == {}
    assert core.state == "condemned"


def test_the_policy_is_asked_again_while_the_fault_is_seen(
    core: MasterCore, judge: ScriptedJudge, policy: ScriptedPolicy
) -> None:
    policy.action = Action.IGNORE
    slow = verdict(FaultKind.WORK_SLOW)
    both(core, 10.0)
    judge.now = [slow]
    assert [one.action for one in core.judge(10.0, 0.0)] == ["ignore"]
    judge.seen = {key_of(slow): 10.9}
    assert core.judge(11.0, 0.0) == ()
    policy.action = Action.EVICT
    (changed,) = core.judge(11.2, 0.0)
    assert (changed.action, changed.repeats) == ("evict", 1)
    assert policy.asked[-1].slow_s == pytest.approx(2.2)


def test_a_fault_that_is_not_seen_just_now_is_not_evicted_for(
    core: MasterCore, judge: ScriptedJudge, policy: ScriptedPolicy
) -> None:
    policy.action = Action.IGNORE
    slow = verdict(FaultKind.WORK_SLOW)
    both(core, 10.0)
    judge.now = [slow]
    core.judge(10.0, 0.0)
    judge.seen = {key_of(slow): 10.0}
    policy.action = Action.EVICT
    assert core.judge(25.0, 0.0) == ()


def test_the_policy_knows_whether_this_generations_loop_reads_its_share_of_the_batch(
    core: MasterCore, judge: ScriptedJudge, policy: ScriptedPolicy
) -> None:
    policy.action = Action.IGNORE

    def can_rebalance(core: MasterCore, now_s: float, number: int = 1) -> bool:
        both(core, now_s, number)
        judge.now = [verdict(FaultKind.WORK_SLOW)]
        core.judge(now_s, 0.0)
        return bool(policy.asked.pop().can_rebalance)

    assert not can_rebalance(core, 10.0)
    core.loop_reads_shares(2)  # of a generation that is not this one
    assert not can_rebalance(core, 11.0)
    core.loop_reads_shares(1)
    assert can_rebalance(core, 12.0)
    heir = MasterCore("run", MonitorSettings(), judge, policy)
    heir.restore(core.snapshot(), 12.5)
    assert can_rebalance(heir, 13.0)
    core.begin_generation(generation(2, first_pid=200), 14.0)
    assert not can_rebalance(core, 15.0, number=2)


def test_the_end_of_a_fault_is_told(core: MasterCore, judge: ScriptedJudge, policy: ScriptedPolicy) -> None:
    policy.action = Action.REBALANCE
    slow = verdict(FaultKind.WORK_SLOW)
    both(core, 10.0)
    judge.now = [slow]
    core.judge(10.0, 0.0)
    judge.seen = {key_of(slow): 10.0}
    core.judge(11.0, 0.0)
    judge.seen = {}
    (cleared,) = core.judge(12.0, 0.0)
    assert (cleared.action, cleared.repeats) == (CLEARED, 1)
    judge.now = [slow]
    (again,) = core.judge(13.0, 0.0)
    assert again.repeats == 0, "it is a new occurrence"


def test_of_a_slow_link_the_senders_node_is_isolated_unless_the_other_end_was_suspected(
    core: MasterCore, judge: ScriptedJudge, policy: ScriptedPolicy
) -> None:
    assert core.nodes_of(verdict(FaultKind.LINK_SLOW, link=(1, 2))) == ("n0",)
    policy.action = Action.IGNORE
    both(core, 10.0)
    judge.now = [verdict(FaultKind.WORK_SLOW, rank=3)]
    core.judge(10.0, 0.0)
    assert core.nodes_of(verdict(FaultKind.LINK_SLOW, link=(1, 2))) == ("n1",)


def test_nothing_is_named_after_the_users_loop_raised(core: MasterCore, judge: ScriptedJudge) -> None:
    both(core, 10.0)
    core.worker_raised(1, 10.0)
    judge.now = [verdict(FaultKind.NEVER_ENTERED)]
    assert core.judge(11.0, 0.0) == ()
    assert core.verdicts == []


def test_nothing_is_named_after_the_generation_ended(core: MasterCore, judge: ScriptedJudge) -> None:
    both(core, 10.0)
    assert core.end_generation(1)
    judge.now = [verdict(FaultKind.PROCESS_DEAD)]
    assert core.judge(11.0, 0.0) == ()
    assert not core.end_generation(1)


# ---- silence


def test_rows_age_while_an_agent_is_silent_but_not_while_it_is_restarted(core: MasterCore) -> None:
    both(core, 10.0)
    push(core, "n0", 13.0)
    seen = core.observation(13.0)
    assert seen is not None
    assert dict(zip(seen.ranks.rank.tolist(), seen.ranks.report_age_s.tolist(), strict=True))[3] == pytest.approx(3.0)
    core.nodes.agent_lost("n1", 11.0)
    excused = core.observation(13.0)
    assert excused is not None
    assert excused.ranks.report_age_s.max() == 0
    long_after = core.observation(11.0 + MonitorSettings().agent_restart_s + 1)
    assert long_after is not None
    assert long_after.ranks.report_age_s.max() > 10


def test_what_the_master_slept_through_is_no_silence_of_others(core: MasterCore, judge: ScriptedJudge) -> None:
    both(core, 10.0)
    core.judge(10.0, 0.0)
    core.judge(10.2, 0.0)
    core.judge(15.0, 0.0)  # the host was busy: the reports of five seconds still wait to be taken in
    assert judge.looks[-1].ranks.report_age_s.max() < 1
    assert core.silent_nodes(15.0, 1.0) == ()
    for tenth in range(1, 21):
        core.judge(15.0 + tenth / 10, 0.0)
    assert judge.looks[-1].ranks.report_age_s.max() > 2
    assert core.silent_nodes(17.0, 1.0) == ("n0", "n1")


def test_an_agent_that_came_back_is_counted_and_its_silence_counts_again(core: MasterCore) -> None:
    both(core, 10.0)
    core.nodes.agent_lost("n1", 10.5)
    push(core, "n1", 11.0, incarnation=2.0)
    seen = core.observation(14.0)
    assert seen is not None
    assert seen.ranks.report_age_s.max() == pytest.approx(4.0)
    assert {node.node_id: node.agent_restarts for node in core.status(14.0).nodes} == {"n0": 0, "n1": 1}


def test_rows_of_a_node_that_the_cluster_calls_dead_are_infinitely_old(core: MasterCore) -> None:
    both(core, 10.0)
    core.nodes.agent_lost("n1", 10.0)
    core.nodes.node_lost("n1")
    seen = core.observation(10.1)
    assert seen is not None
    assert sorted(seen.ranks.report_age_s.tolist())[2:] == [math.inf, math.inf]
    push(core, "n1", 10.2)  # it was not dead after all
    seen = core.observation(10.2)
    assert seen is not None
    assert seen.ranks.report_age_s.max() < 1


def test_a_node_that_never_reported_counts_as_silent_after_the_grace(core: MasterCore) -> None:
    push(core, "n0", 5.0)
    early = core.observation(10.0)
    assert early is not None
    assert early.ranks.rank.tolist() == [0, 1]
    late = core.observation(40.0)
    assert late is not None
    assert sorted(late.ranks.rank.tolist()) == [0, 1, 2, 3]
    assert late.ranks.report_age_s[list(late.ranks.rank).index(2)] == pytest.approx(40.0)


# ---- stacks, status


def test_stacks_of_a_hung_rank_are_ordered_and_attached(
    core: MasterCore, judge: ScriptedJudge, policy: ScriptedPolicy
) -> None:
    policy.action = Action.IGNORE
    both(core, 10.0)
    judge.now = [verdict(rank=2)]
    core.judge(10.0, 0.0)
    assert push(core, "n0", 10.1).stacks == ()
    assert push(core, "n1", 10.1).stacks == (2,)
    assert push(core, "n1", 10.2).stacks == (), "once"
    core.take_stacks(Report("n1", 1.0, b"", stacks=(Stack(2, 102, "Thread 1 (idle)"),)))
    assert core.verdicts[0].stacks[0].text == "Thread 1 (idle)"


def test_the_status_has_a_row_for_every_worker_reported_or_not(core: MasterCore) -> None:
    push(core, "n0", 10.0)
    status = core.status(11.0)
    assert [(row.rank, row.process) for row in status.ranks] == [
        (0, "sleeping"), (1, "sleeping"), (2, "unknown"), (3, "unknown"),
    ]  # fmt: skip
    assert (status.state, status.world_size, status.generation) == ("watching", 4, 1)


def test_bytes_received_are_told_per_second(core: MasterCore) -> None:
    for tenth in range(101):
        push(core, "n0", tenth / 10)
    assert core.status(10.0).bytes_per_s == pytest.approx(1000, rel=0.05)


# ---- a successor


def test_a_successor_knows_generation_quarantine_verdicts_and_fences(core: MasterCore, judge: ScriptedJudge) -> None:
    push(core, "n1", 9.0, started=((102, 7000), (103, 7001)))
    both(core, 10.0)
    judge.now = [verdict(rank=2)]
    core.judge(10.0, 5.0)
    written = json.loads(json.dumps(core.snapshot()))

    after = MasterCore("run", MonitorSettings(), ScriptedJudge(), ScriptedPolicy())
    after.restore(written, 50.0)
    assert after.generation == core.generation
    assert after.quarantine == core.quarantine
    assert after.verdicts == core.verdicts
    assert after.state == "condemned"
    assert set(after.nodes_to_watch()) == {"n0", "n1"}
    assert Fence(1, 102, 7000) in push(after, "n1", 50.1).kill
    after.begin_generation(generation(2, first_pid=200), 51.0)
    assert after.snapshot()["generation"]["number"] == 2


def test_a_successor_goes_on_numbering(core: MasterCore, judge: ScriptedJudge) -> None:
    both(core, 10.0)
    judge.now = [verdict(rank=2)]
    core.judge(10.0, 5.0)
    other = ScriptedJudge()
    after = MasterCore("run", MonitorSettings(), other, ScriptedPolicy())
    after.restore(core.snapshot(), 50.0)
    after.begin_generation(Generation(2, generation(2, first_pid=200).workers), 51.0)
    both(after, 52.0, number=2)
    other.now = [verdict(rank=1)]
    assert [one.number for one in after.judge(52.0, 6.0)] == [2]


def test_a_release_ends_the_quarantine(core: MasterCore) -> None:
    core.set_quarantine("n1", "by hand")
    assert core.release("n1")
    assert not core.release("n1")
    assert core.quarantine == {}
