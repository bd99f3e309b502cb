"""Live trials: real faults injected into a real training of four processes, watched by the real monitors; are they named rightly?

A trial is right when the first verdict after the fault's onset has its class and its culprit. Slow faults are taken back and the
set of workers goes on; a hang ends its set, and the next one is forked.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from actors.c4 import processes
from actors.c4.diagnosis.verdict import FaultClass, FaultKind
from actors.c4.generation import Generation
from actors.c4.injection.faults import Fault, FaultName, InjectionError
from actors.c4.injection.inject import Injected, Target, inject
from actors.c4.ports import CLEARED, NumberedVerdict
from actors.c4.recorder.layout import ring_path
from benchmarks.c4.monitor import LocalMonitor
from benchmarks.c4.training import Job, WorkerSet, training

TIMEOUT_S = 8.0
"""A fault that is not named by then is missed."""
AFTER_S = 1.0
"""How long further verdicts are collected after the first."""
WARM_STEPS = 36
RECOVERY_S = 2.5
STUCK_S = 3600.0


@dataclass(frozen=True)
class Plan:
    """A kind of trial."""

    name: str
    fault: FaultName
    kinds: tuple[FaultKind, ...]
    """Verdicts that are right."""
    ends_set: bool
    duration_s: float | None = None


HANGS = (
    Plan("SIGSTOP", FaultName.SIGSTOP, (FaultKind.PROCESS_STOPPED,), True),
    Plan("mismatched collective", FaultName.MISMATCHED_COLLECTIVE, (FaultKind.MISMATCHED_COLLECTIVE,), True),
    Plan("GIL lock", FaultName.GIL_LOCK, (FaultKind.HEARTBEAT_LOST,), True),
    Plan("stalled link", FaultName.STALLED_LINK, (FaultKind.LINK_STALLED,), True),
    Plan("SIGKILL", FaultName.SIGKILL, (FaultKind.PROCESS_DEAD,), True),
    Plan("skipped collective", FaultName.SKIPPED_COLLECTIVE, (FaultKind.MISMATCHED_COLLECTIVE,), True),
    Plan("stuck outside", FaultName.PAUSE, (FaultKind.NEVER_ENTERED,), True, STUCK_S),
    Plan("stalled link", FaultName.STALLED_LINK, (FaultKind.LINK_STALLED,), True),
    Plan("node loss", FaultName.NODE_LOSS, (FaultKind.NODE_LOST,), True),
    Plan("mismatched collective", FaultName.MISMATCHED_COLLECTIVE, (FaultKind.MISMATCHED_COLLECTIVE,), True),
)
SLOW = (
    Plan("slow compute", FaultName.SLOW_COMPUTE, (FaultKind.WORK_SLOW,), False),
    Plan("slow link", FaultName.SLOW_LINK, (FaultKind.LINK_SLOW, FaultKind.SENDER_SLOW), False),
)


@dataclass(frozen=True)
class Trial:
    """How one ended."""

    plan: Plan
    culprit: str
    named: tuple[NumberedVerdict, ...]
    """Verdicts from the onset to the trial's end."""
    detection_s: float
    """Onset to the first verdict; ``TIMEOUT_S`` when there was none."""
    class_right: bool
    culprit_right: bool
    note: str = ""

    @property
    def right(self) -> bool:
        return self.class_right and self.culprit_right

    @property
    def expected(self) -> FaultClass:
        return self.plan.kinds[0].fault_class


def trials(
    count: int, seed: int, rings: Path, say: Callable[[str], None], slow_a_set: int = 1
) -> tuple[list[Trial], list[NumberedVerdict], LocalMonitor]:
    """At least ``count`` trials; also the verdicts that came while nothing was wrong, and the monitor with its figures."""
    rng = random.Random(seed)
    hangs, slow = _endless(HANGS), _endless(SLOW)
    done: list[Trial] = []
    false_alarms: list[NumberedVerdict] = []
    monitor = LocalMonitor(f"live{seed}", rings)
    number = 0
    try:
        while len(done) < count:
            number += 1
            plans = [next(slow) for _ in range(slow_a_set)] + [next(hangs)]
            with training(f"live{seed}", number, Job(seed=seed * 1000 + number), rings, rng.choice((2, 4))) as workers:
                workers.wait_for_step(1)
                generation = workers.generation()
                monitor.begin(generation)
                workers.wait_for_step(WARM_STEPS)
                ranks = rng.sample(range(workers.job.world_size), len(plans))
                for plan, rank in zip(plans, ranks, strict=True):
                    time.sleep(rng.uniform(0.2, 1.5))
                    false_alarms += _verdicts_of(monitor, number, _told(done, false_alarms))
                    trial = _run(plan, rank, rng.uniform(1.8, 4.0), workers, generation, monitor, rings)
                    done.append(trial)
                    seen = ", ".join(f"{one.verdict.kind} {one.verdict.culprit}" for one in trial.named) or "nothing"
                    say(
                        f"{len(done):3d} {plan.name} at {trial.culprit}: {seen} after {trial.detection_s:.2f} s"
                        f"{'' if trial.right else '  WRONG ' + trial.note}"
                    )
                    if not plan.ends_set:
                        time.sleep(RECOVERY_S)
                monitor.end(number)
    finally:
        monitor.close()
    return done, false_alarms, monitor


def healthy(
    minutes: float, seed: int, rings: Path, say: Callable[[str], None]
) -> tuple[list[NumberedVerdict], float, list[int], LocalMonitor]:
    """Training with evaluation, checkpoint and GC pauses and no fault: (false alarms, minutes, steps done, monitor)."""
    job = Job(evaluate_every=30, checkpoint_every=50, collect_every=70, seed=seed)
    monitor = LocalMonitor(f"healthy{seed}", rings)
    try:
        with training(f"healthy{seed}", 1, job, rings, 2) as workers:
            workers.wait_for_step(1)
            monitor.begin(workers.generation())
            began = time.monotonic()
            while (passed := time.monotonic() - began) < minutes * 60:
                time.sleep(min(30.0, minutes * 60 - passed))
                workers.wait_for_step(1)  # all are alive
                alarms = _alarms(monitor)
                named = "".join(
                    f"; {one.verdict.kind} {one.verdict.culprit}: {one.verdict.evidence[0]}" for one in alarms
                )
                passed_minutes = (time.monotonic() - began) / 60
                say(f"healthy for {passed_minutes:.1f} minutes: steps {workers.steps()}, {len(alarms)} alarms{named}")
            return _alarms(monitor), (time.monotonic() - began) / 60, workers.steps(), monitor
    finally:
        monitor.close()


def target_of(workers: WorkerSet, generation: Generation, rank: int, rings: Path) -> Target:
    """The worker as the injection knows it."""
    worker = generation.workers[rank]
    facts = processes.look(worker.pid)
    if facts is None:
        raise InjectionError(f"The process of rank {rank} has ended.")
    ring = ring_path(rings, workers.run, generation.number, rank, worker.pid)
    return Target(rank, worker.pid, facts.started_ticks, ring)


def _run(
    plan: Plan, rank: int, factor: float, workers: WorkerSet, generation: Generation, monitor: LocalMonitor, rings: Path
) -> Trial:
    target = target_of(workers, generation, rank, rings)
    size = workers.job.world_size
    peer = (rank + 1) % size if plan.fault in (FaultName.SLOW_LINK, FaultName.STALLED_LINK) else None
    ranks: tuple[int, ...] = (rank,)
    if plan.fault is FaultName.NODE_LOSS:
        node = generation.workers[rank].node_id
        ranks = tuple(worker.rank for worker in generation.on_node(node))
        others = [target_of(workers, generation, other, rings) for other in ranks if other != rank]
        target = replace(target, node_pids=tuple((one.pid, one.started_ticks) for one in others))
        monitor.silenced.add(node)
    fault = Fault(plan.fault, rank, peer=peer, factor=factor, duration_s=plan.duration_s)
    before = max((one.number for one in monitor.verdicts()), default=0)
    injected = inject(fault, target, workers.control)
    onset_s = injected.at_ns / 1e9
    found = _wait(monitor, generation.number, before, onset_s)
    _take_back(injected)
    culprit = f"link {rank}->{peer}" if peer is not None else f"rank {', '.join(map(str, ranks))}"
    if not found:
        return Trial(plan, culprit, (), TIMEOUT_S, False, False, "missed")
    first = found[0].verdict
    link = (rank, peer) if peer is not None else None
    if first.kind is FaultKind.SENDER_SLOW:
        right = first.culprit.ranks == (rank,)
    else:
        right = first.culprit.link == link if link is not None else first.culprit.ranks == ranks
    return Trial(
        plan, culprit, tuple(found), first.found_s - onset_s, first.fault_class is plan.kinds[0].fault_class, right,
        f"{first.kind} {first.culprit}: {first.evidence[0]}",
    )  # fmt: skip


def _wait(monitor: LocalMonitor, number: int, before: int, onset_s: float) -> list[NumberedVerdict]:
    """Verdicts after the onset: up to the first, and a little longer."""
    deadline = onset_s + TIMEOUT_S
    while time.monotonic() < deadline:
        found = _verdicts_of(monitor, number, before)
        if found:
            deadline = min(deadline, time.monotonic() + AFTER_S)
            while time.monotonic() < deadline:
                time.sleep(0.05)
            return _verdicts_of(monitor, number, before)
        time.sleep(0.02)
    return []


def _take_back(injected: Injected) -> None:
    if injected.fault.name in (FaultName.SLOW_COMPUTE, FaultName.SLOW_LINK):
        injected.stop()


def _verdicts_of(monitor: LocalMonitor, generation: int, after: int) -> list[NumberedVerdict]:
    return [
        one
        for one in monitor.verdicts()
        if one.number > after and one.generation == generation and one.repeats == 0 and one.action != CLEARED
    ]


def _alarms(monitor: LocalMonitor) -> list[NumberedVerdict]:
    return [one for one in monitor.verdicts() if one.repeats == 0 and one.action != CLEARED]


def _told(done: list[Trial], false_alarms: list[NumberedVerdict]) -> int:
    """The newest verdict that belongs to a trial or has been counted already."""
    numbers = [one.number for trial in done for one in trial.named] + [one.number for one in false_alarms]
    return max(numbers, default=0)


def _endless(plans: tuple[Plan, ...]) -> Iterator[Plan]:
    while True:
        yield from plans
