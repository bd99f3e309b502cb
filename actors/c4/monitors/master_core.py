"""What the C4 master knows and decides: generations, the newest observation of every node, verdicts, quarantine, fences.

Pure: every method is told the time (seconds, monotonic, of the caller's choice), nothing here waits, sends or reads a file.
The actor ``master`` is a thin shell around it; simulators and benchmarks drive it directly.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from actors.c4.diagnosis.observation import Observation, merge
from actors.c4.diagnosis.verdict import FaultClass, Verdict
from actors.c4.generation import Generation, Worker
from actors.c4.monitors.fences import Fences
from actors.c4.monitors.master_state import generation_from, generation_to, verdict_from, verdict_to
from actors.c4.monitors.master_view import delay_matrices, median_operation_s, rank_rows, waits
from actors.c4.monitors.nodes import Nodes
from actors.c4.monitors.settings import MonitorSettings
from actors.c4.ports import CLEARED, MasterStatus, NumberedVerdict, Orders, Report
from actors.c4.recovery.policy import Action, Decision, Situation, decide

Policy = Callable[[Verdict, Situation], Decision]
Key = tuple[Any, ...]
"""(kind, ranks, link): what makes a fault the same at the next look."""


class Judge(Protocol):
    """The diagnosis (``judge``): names each fault once, and tells which named ones it still sees."""

    def look(self, observation: Observation, memory: Any) -> tuple[tuple[Verdict, ...], Any]:
        """What is named now, and the memory for the next look; ``memory`` None at first."""

    def standing(self, memory: Any) -> Mapping[Key, float]:
        """Named faults that are not forgotten -> when they were last seen (on the observations' clock)."""


def key_of(verdict: Verdict) -> Key:
    """See ``Key``."""
    return (verdict.kind, verdict.culprit.ranks, verdict.culprit.link)


@dataclass
class MasterCore:
    """See the module. ``version`` grows with everything that ``snapshot`` holds."""

    run: str
    settings: MonitorSettings
    judge_with: Judge
    policy: Policy = decide
    version: int = 0
    spare_nodes: int = 0
    """Nodes that could take over; the shell tells."""
    generation: Generation | None = None
    state: str = "none"
    verdicts: list[NumberedVerdict] = field(default_factory=list)
    quarantine: dict[str, str] = field(default_factory=dict)
    evictions: int = 0
    began_s: float = 0.0
    quiet_until_s: float = -math.inf
    _reads_shares: bool = False
    _fences: Fences = field(default_factory=Fences)
    _stacks_wanted: dict[str, set[int]] = field(default_factory=dict)
    _memory: Any = None
    _pace: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=240))
    """(time, median operation) once a second or less."""
    _judged_s: float = math.nan
    _active: dict[Key, NumberedVerdict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = Nodes(self.settings)

    # ---- generations

    def begin_generation(self, generation: Generation, now_s: float) -> None:
        """Watch these workers from now on; what is left of older generations is fenced off.

        Raises:
            ValueError: the number is not above the last one's. The same generation told again changes nothing.
        """
        if self.generation is not None:
            if generation == self.generation:
                return
            if generation.number <= self.generation.number:
                raise ValueError(
                    f"Generation {generation.number} of {self.run} cannot begin after generation {self.generation.number}."
                )
            self._fences.add(self.generation)
        self._fences.spare(generation)
        self.generation, self.state, self.began_s = generation, "watching", now_s
        self._memory, self._active, self.quiet_until_s = None, {}, -math.inf
        self._judged_s = math.nan
        self._reads_shares = False
        self._stacks_wanted = {}
        self._pace.clear()
        self.nodes.forget_observations()
        self.version += 1

    def end_generation(self, number: int) -> bool:
        """Stop judging it: it finished, failed by itself, or was aborted. False when another one is current."""
        if self.generation is None or self.generation.number != number or self.state == "ended":
            return False
        self.state = "ended"
        self.version += 1
        return True

    def worker_raised(self, number: int, now_s: float) -> None:
        """The user's loop raised in a worker: what stops then is a consequence, no fault of a node."""
        if self.generation is not None and self.generation.number == number:
            self.quiet_until_s = now_s + self.settings.raise_grace_s

    def request_fence(self, number: int) -> None:
        """Have every worker of the generations up to ``number`` killed."""
        if self.generation is not None and self.generation.number <= number:
            self._fences.add(self.generation)
            if self.state == "watching":
                self.state = "condemned"
            self.version += 1

    def fences_left(self) -> int:
        """Processes that were ordered to end and of which no agent has said that they did."""
        return sum(len(self._fences.of_node(node)) for node in self._fences.nodes())

    # ---- agents

    def observe(self, report: Report, observation: Observation | None, now_s: float) -> Orders:
        """Take a report in; ``observation`` is its unpacked content (None: there was none, or it could not be unpacked)."""
        self.version += self._fences.done(report.node_id, report.gone)
        number = self.generation.number if self.generation is not None else 0
        accepted, unreadable = False, bool(report.packed) and observation is None
        if observation is not None and observation.generation == number and number:
            self.version += self._fences.learn(number, report.node_id, report.started)
            accepted = True
        self.nodes.heard(report, observation if accepted else None, now_s)
        workers: tuple[Worker, ...] = ()
        if self.generation is not None and self.state != "ended":
            workers = self.generation.on_node(report.node_id)
        return Orders(
            generation=number,
            workers=workers,
            kill=self._fences.of_node(report.node_id),
            stacks=tuple(sorted(self._stacks_wanted.pop(report.node_id, ()))),
            full=unreadable,
            accepted=accepted or not report.packed,
        )

    def take_stacks(self, report: Report) -> None:
        """Attach the stacks that an agent brought to the newest verdicts that name their ranks."""
        for index, one in enumerate(self.verdicts):
            culprit = one.verdict.culprit
            ranks = set(culprit.ranks) | set(culprit.link or ())
            new = [s for s in report.stacks if s.rank in ranks and all(s.pid != old.pid for old in one.stacks)]
            if new and one.generation == (self.generation.number if self.generation else 0):
                self.verdicts[index] = replace(one, stacks=(*one.stacks, *new))
                self.version += 1

    def want_stacks(self, rank: int) -> bool:
        """Order the stacks of a rank; False when there is no such rank."""
        worker = self.worker(rank)
        if worker is not None:
            self._stacks_wanted.setdefault(worker.node_id, set()).add(rank)
        return worker is not None

    def silent_nodes(self, now_s: float, for_s: float) -> tuple[str, ...]:
        """Nodes of the generation of which nothing has come for so long, and nothing is known that would explain it."""
        nodes = self.generation.nodes if self.generation is not None and self.state == "watching" else ()
        return self.nodes.silent(nodes, now_s, for_s)

    def worker(self, rank: int) -> Worker | None:
        """Of the current generation."""
        workers = self.generation.workers if self.generation is not None else ()
        return next((worker for worker in workers if worker.rank == rank), None)

    def nodes_to_watch(self) -> tuple[str, ...]:
        """Nodes that must have an agent: of the current generation, and those with fences to carry out."""
        current = self.generation.nodes if self.generation is not None else ()
        return tuple(dict.fromkeys((*current, *self._fences.nodes())))

    # ---- judging

    def observation(self, now_s: float, fresh: bool = False) -> Observation | None:
        """Of the whole job; None while no node has reported. Rows age while their agent is silent.

        ``fresh``: only the blocks that no earlier call with this has had.
        """
        if self.generation is None:
            return None
        parts = self.nodes.observations(self.generation, now_s, now_s - self.began_s, fresh)
        return merge(parts, now_s) if parts else None

    def judge(self, now_s: float, wall_s: float) -> tuple[NumberedVerdict, ...]:
        """Diagnose once and decide; returns what is new: verdicts, or changed decisions on known ones.

        ``wall_s``: seconds since the epoch, for the record.
        """
        if self.state != "watching" or self.generation is None:
            return ()
        due_s = 2 * self.settings.diagnose_s
        if not math.isnan(self._judged_s):
            self.nodes.master_late(now_s - self._judged_s - due_s)
        self._judged_s = now_s
        observation = self.observation(now_s, fresh=True)
        if observation is None:
            return ()
        found, self._memory = self.judge_with.look(observation, self._memory)
        new_pace = median_operation_s(observation)
        if not math.isnan(new_pace) and (not self._pace or now_s - self._pace[-1][0] >= 1.0):
            self._pace.append((now_s, new_pace))
        operation_s = self.pace_s() or math.nan
        if now_s < self.quiet_until_s:
            return ()
        seen = self.judge_with.standing(self._memory)
        new: list[NumberedVerdict] = []
        evict: list[tuple[NumberedVerdict, Decision]] = []
        for key in [key for key in self._active if key not in seen]:
            gone = self._active.pop(key)
            new.append(self._number(gone.verdict, CLEARED, "no longer seen", wall_s, gone))
        recent_s = max(3.0, 12 * operation_s) if operation_s > 0 else 3.0
        standing = [one.verdict for key, one in self._active.items() if now_s - seen[key] <= recent_s]
        for verdict in (*found, *standing):
            known = self._active.get(key_of(verdict))
            decision = self.policy(verdict, self._situation(verdict, operation_s, now_s))
            if known is not None and known.action == decision.action:
                continue
            one = self._number(verdict, decision.action.value, decision.reason, wall_s, known)
            self._active[key_of(verdict)] = one
            new.append(one)
            if decision.action is Action.EVICT:
                evict.append((one, decision))
        self._order_stacks(new)
        if evict:
            self._evict(evict)
        if new:
            self.version += 1
        return tuple(new)

    def _number(
        self, verdict: Verdict, action: str, reason: str, wall_s: float, known: NumberedVerdict | None
    ) -> NumberedVerdict:
        """The next entry of the list of verdicts; its culprit's nodes by the names that people know."""
        workers = [self.worker(rank) for rank in verdict.culprit.link or verdict.culprit.ranks]
        names = tuple(dict.fromkeys(worker.node_name for worker in workers if worker is not None))
        verdict = replace(verdict, culprit=replace(verdict.culprit, nodes=names or verdict.culprit.nodes))
        one = NumberedVerdict(
            number=self.verdicts[-1].number + 1 if self.verdicts else 1,
            generation=self.generation.number if self.generation is not None else 0,
            verdict=verdict,
            action=action,
            reason=reason,
            named_at=wall_s,
            repeats=0 if known is None else known.repeats or known.number,
            nodes=self.nodes_of(verdict),
        )
        self.verdicts.append(one)
        del self.verdicts[: -self.settings.verdicts_kept]
        return one

    def _order_stacks(self, new: list[NumberedVerdict]) -> None:
        hangs = (FaultClass.COMMUNICATION_HANG, FaultClass.NON_COMMUNICATION_HANG)
        for one in new:
            culprit = one.verdict.culprit
            if self.settings.stacks and one.repeats == 0 and one.verdict.fault_class in hangs:
                for rank in (*culprit.ranks, *(culprit.link or ())):
                    self.want_stacks(rank)

    def _evict(self, evicted: list[tuple[NumberedVerdict, Decision]]) -> None:
        """Condemn the generation; quarantine the nodes that are at fault."""
        self.evictions += 1
        for one, decision in evicted:
            for node_id in one.nodes if decision.quarantine else ():
                self.quarantine.setdefault(node_id, f"{one.verdict.kind} of {one.verdict.culprit}")
        if self.generation is not None:
            self._fences.add(self.generation)
        self.state = "condemned"

    def nodes_of(self, verdict: Verdict) -> tuple[str, ...]:
        """Ids of the nodes to isolate: of the ranks; of a link the sender's end, unless only the receiver's end has had
        verdicts before (either end cures the link, and one node is cheaper than two)."""
        ranks = verdict.culprit.ranks
        if verdict.culprit.link is not None:
            ends = [worker.node_id for rank in verdict.culprit.link if (worker := self.worker(rank)) is not None]
            suspected = [node for node in ends if any(node in one.nodes for one in self.verdicts)]
            return tuple((suspected or ends)[:1])
        found = [worker.node_id for rank in ranks if (worker := self.worker(rank)) is not None]
        return tuple(dict.fromkeys(found))

    def _situation(self, verdict: Verdict, operation_s: float, now_s: float) -> Situation:
        healthy = [pace for at, pace in self._pace if at < verdict.onset_s and not math.isnan(pace)]
        return Situation(
            step_s=0.0 if math.isnan(operation_s) else operation_s,
            running_s=now_s - self.began_s,
            slow_s=max(0.0, now_s - verdict.onset_s),
            spare_nodes=self.spare_nodes,
            nodes=len(self.generation.nodes) if self.generation is not None else 0,
            evictions=self.evictions,
            healthy_step_s=float(np.median(healthy[-30:])) if healthy else 0.0,
            world_size=self.generation.world_size if self.generation is not None else 0,
            can_rebalance=self._reads_shares,
        )

    def loop_reads_shares(self, number: int) -> None:
        """The loop of this generation has asked for its share of the batch: rebalancing would take effect."""
        if self.generation is not None and self.generation.number == number:
            self._reads_shares = True
            self.version += 1

    def release(self, node_id: str) -> bool:
        """Let a node take part again; False when it was not quarantined."""
        released = self.quarantine.pop(node_id, None) is not None
        self.version += released
        return released

    def set_quarantine(self, node_id: str, reason: str) -> None:
        """Isolate a node by hand."""
        self.quarantine[node_id] = reason
        self.version += 1

    def pace_s(self) -> float:
        """Median operation as of the last second; 0 when unknown."""
        return self._pace[-1][1] if self._pace and self._pace[-1][1] > 0 else 0.0

    # ---- telling

    def status(self, now_s: float, cost_ms_per_s: float = 0.0) -> MasterStatus:
        """For ``watch`` and reports."""
        generation, observation = self.generation, self.observation(now_s)
        return MasterStatus(
            run=self.run,
            generation=generation.number if generation is not None else 0,
            world_size=generation.world_size if generation is not None else 0,
            running_s=now_s - self.began_s if generation is not None else 0.0,
            state=self.state,
            ranks=rank_rows(generation, observation),
            nodes=self.nodes.statuses(generation, self.quarantine, now_s),
            verdicts=tuple(self.verdicts[-50:]),
            quarantine=dict(self.quarantine),
            delays=delay_matrices(observation) if observation is not None else (),
            waiting=waits(observation) if observation is not None else (),
            operation_s=median_operation_s(observation) if observation is not None else math.nan,
            bytes_per_s=self.nodes.bytes_per_s(),
            cost_ms_per_s=cost_ms_per_s,
            injection=self.settings.injection,
        )

    def snapshot(self) -> dict[str, Any]:
        """What a restarted master must know, as JSON values; ``restore`` takes it."""
        return {
            "run": self.run,
            "generation": generation_to(self.generation) if self.generation is not None else None,
            "state": self.state,
            "quarantine": self.quarantine,
            "evictions": self.evictions,
            "reads_shares": self._reads_shares,
            "verdicts": [verdict_to(one) for one in self.verdicts[-100:]],
            "fences": self._fences.snapshot(),
        }

    def restore(self, data: Mapping[str, Any], now_s: float) -> None:
        """Take over what a former master of this run knew; observations come again by themselves.

        Raises:
            ValueError, KeyError, TypeError: this is no snapshot.
        """
        self.generation = generation_from(data["generation"]) if data["generation"] is not None else None
        self.state, self.quarantine = str(data["state"]), dict(data["quarantine"])
        self.evictions = int(data["evictions"])
        self._reads_shares = bool(data.get("reads_shares", False))
        self.verdicts = [verdict_from(one) for one in data["verdicts"]]
        self._fences.restore(data["fences"])
        self.began_s = now_s
