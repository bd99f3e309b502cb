"""Trials: a healthy job, faults injected into its continuation, the verdicts of the real diagnosis; are they right?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.c4.diagnosis.diagnose import diagnose
from actors.c4.diagnosis.memory import DiagnosisMemory
from actors.c4.diagnosis.observation import Observation, merge
from actors.c4.diagnosis.settings import DiagnosisSettings
from actors.c4.diagnosis.verdict import FaultKind, Verdict
from apps.c4.fleet.clockwork import Clockwork, Effects, Pace, StepTimes, effects_of, no_effects
from apps.c4.fleet.faults import FleetFault, Injected
from apps.c4.fleet.observe import Reporter, Struck, split
from apps.c4.fleet.shape import Shape

EXPECTED = {
    Injected.DEAD: FaultKind.PROCESS_DEAD,
    Injected.STOPPED: FaultKind.PROCESS_STOPPED,
    Injected.GIL: FaultKind.HEARTBEAT_LOST,
    Injected.STUCK: FaultKind.NEVER_ENTERED,
    Injected.NODE_LOST: FaultKind.NODE_LOST,
    Injected.MISMATCH: FaultKind.MISMATCHED_COLLECTIVE,
    Injected.LINK_STALL: FaultKind.LINK_STALLED,
    Injected.LINK_SLOW: FaultKind.LINK_SLOW,
    Injected.SENDER_SLOW: FaultKind.SENDER_SLOW,
    Injected.RECEIVER_SLOW: FaultKind.RECEIVER_SLOW,
    Injected.WORK_SLOW: FaultKind.WORK_SLOW,
    Injected.NODE_WORK_SLOW: FaultKind.WORK_SLOW,
}
HEALTHY_STEPS = 13
SLOW_STEPS = 7
"""Steps within which a slowness has to be named."""


@dataclass(frozen=True)
class Trial:
    """One course of the job: what was broken, what was said."""

    faults: tuple[FleetFault, ...]
    verdicts: tuple[Verdict, ...]
    step_s: float
    onsets_s: tuple[float, ...]

    @property
    def classes_right(self) -> bool:
        return sorted(fault.fault_class for fault in self.faults) == sorted(
            one.fault_class.value for one in self.verdicts
        )

    @property
    def right(self) -> bool:
        """Every fault named with class, kind and culprit, and nothing else named."""
        return len(self.verdicts) == len(self.faults) and all(
            any(matches(v, f) for v in self.verdicts) for f in self.faults
        )

    @property
    def detection_s(self) -> tuple[float, ...]:
        """From each fault's true onset to its verdict, for those that were named."""
        pairs = [
            (next((v for v in self.verdicts if matches(v, fault)), None), onset)
            for fault, onset in zip(self.faults, self.onsets_s, strict=True)
        ]
        return tuple(verdict.found_s - onset for verdict, onset in pairs if verdict is not None)


def matches(verdict: Verdict, fault: FleetFault) -> bool:
    """Whether a verdict names this fault: class, kind and culprit."""
    return (
        verdict.kind is EXPECTED[fault.kind]
        and verdict.fault_class.value == fault.fault_class
        and verdict.culprit.link == fault.link
        and verdict.culprit.ranks == (() if fault.link else tuple(sorted(fault.ranks)))
    )


class HealthyJob:
    """A job after its first healthy steps, with the memory that the diagnosis has of it. Trials fork from it."""

    def __init__(
        self, shape: Shape, pace: Pace = Pace(), seed: int = 0, settings: DiagnosisSettings = DiagnosisSettings()
    ):
        self.shape, self.pace, self.seed, self.settings = shape, pace, seed, settings
        self.clock = Clockwork(shape, pace, seed)
        self.reporter = Reporter(shape, pace, seed + 1)
        self.memory = DiagnosisMemory()
        self.false_alarms: list[Verdict] = []
        self.steps = 0
        self.before: StepTimes | None = None
        self.last: StepTimes | None = None
        self.step_s = float("nan")
        self._pauses = np.random.default_rng(seed + 2)
        ends: list[float] = []
        for _ in range(HEALTHY_STEPS):
            self.healthy_step(pauses=len(ends) > 3)
            ends.append(float(self.clock.free.max()))
            if len(ends) > 1:
                self.step_s = float(np.median(np.diff(ends)))

    def healthy_step(self, pauses: bool = True) -> None:
        """One more step, at times with a healthy pause, observed at its end and once within."""
        pause = healthy_pause(self.shape, self.step_s, self._pauses) if pauses and np.isfinite(self.step_s) else None
        if pause is not None:
            self.clock.pause(pause)
        begin = float(self.clock.free.max())
        step = self.clock.step(no_effects(self.shape, 1))
        end = float(self.clock.free.max())
        index = self.steps
        within = begin + float(self._pauses.uniform(0.3, 0.9)) * (end - begin)
        for at_s, blocks in ((within, ()), (end + 1e-6, [(index, step)])):
            seen = self.reporter.observe(
                0, at_s, self.last, step, max(index - 1, 0), self.step_s, blocks, links=pause is not None
            )
            said, self.memory = diagnose(seen, self.memory, self.settings)
            self.false_alarms += said
        self.before, self.last = self.last, step
        self.steps += 1


def healthy_pause(shape: Shape, step_s: float, rng: np.random.Generator) -> np.ndarray | None:
    """Evaluation or checkpoint of all, or a collection of garbage or a checkpoint of one rank: up to five steps; or nothing."""
    full = (shape.pipeline, 1, shape.data, shape.tensor)
    pause = np.zeros(full)
    match int(rng.integers(6)):
        case 0:
            pause += step_s * rng.uniform(0.5, 4.5) * (1 + 0.05 * rng.standard_normal(full))
        case 1:
            pause.reshape(-1)[rng.integers(shape.ranks)] = step_s * rng.uniform(0.2, 5.0)
        case 2:
            pause[:, :, 0] = step_s * rng.uniform(0.2, 3.0)
        case _:
            return None
    return np.maximum(pause, 0.0)


def run_trials(
    job: HealthyJob, faults: Sequence[Sequence[FleetFault]], seed: int, through_nodes: bool = False
) -> list[Trial]:
    """One trial for each list of faults, forked from the healthy job.

    Args:
        through_nodes: observations go through one report a node and the master's merge.
    """
    shape, count = job.shape, len(faults)
    clock = job.clock.fork(count, seed)
    reporter = Reporter(shape, job.pace, seed + 1)
    memories = [job.memory] * count
    verdicts: list[list[Verdict]] = [[] for _ in faults]
    onsets: list[dict[int, float]] = [{} for _ in faults]
    begin = clock.free.max(axis=(0, 2, 3))
    for scenario, mine in enumerate(faults):
        onsets[scenario] = {index: float(begin[scenario]) for index, fault in enumerate(mine) if not fault.kind.is_hang}

    def look(scenario: int, seen: Observation) -> None:
        if through_nodes:
            seen = merge(split(seen), seen.at_s)
        said, memories[scenario] = diagnose(seen, memories[scenario], job.settings)
        verdicts[scenario] += said

    slow = [[fault for fault in mine if not fault.kind.is_hang] for mine in faults]
    effects = effects_of(shape, slow)
    last, index = job.last, job.steps
    last = _repeat(last, count) if last is not None else None
    if any(slow):
        for _ in range(SLOW_STEPS):
            step = clock.step(effects)
            ends = clock.free.max(axis=(0, 2, 3))
            for scenario, mine in enumerate(slow):
                if mine and len(verdicts[scenario]) < len(mine):
                    at_s = float(ends[scenario]) + 1e-6
                    look(scenario, reporter.observe(scenario, at_s, last, step, index - 1, job.step_s, [(index, step)]))
            last, index = step, index + 1
    hangs = [[fault for fault in mine if fault.kind.is_hang] for mine in faults]
    if any(hangs):
        _hang(job, clock, reporter, effects, faults, hangs, last, index, look, verdicts, onsets)
    return [
        Trial(
            tuple(mine), tuple(verdicts[s]), job.step_s, tuple(onsets[s].get(i, float("nan")) for i in range(len(mine)))
        )
        for s, mine in enumerate(faults)
    ]


def _hang(job, clock, reporter, effects: Effects, faults, hangs, last, index, look, verdicts, onsets) -> None:  # type: ignore[no-untyped-def]
    effects.hangs += [(scenario, fault) for scenario, mine in enumerate(hangs) for fault in mine]
    free = clock.free.copy()
    step = clock.step(effects)
    for scenario, mine in enumerate(hangs):
        if not mine:
            continue
        struck = [
            Struck(fault, onset)
            for fault in mine
            if (onset := onset_of(job.shape, free, step, scenario, fault)) is not None
        ]
        for one in struck:
            onsets[scenario][list(faults[scenario]).index(one.fault)] = one.onset_s
        wanted = len(faults[scenario])
        start = min((one.onset_s for one in struck), default=float(free[:, scenario].max()))
        first = True
        patience = 7.0 * job.step_s * 1.6 + 3.0
        for at_s in np.arange(start + 0.1, start + patience, 0.5 * job.step_s):
            now = [one for one in struck if one.onset_s <= at_s]
            blocks = [(index, step)] if first else []
            look(
                scenario,
                reporter.observe(scenario, float(at_s), last, step, index - 1, job.step_s, blocks, now, links=True),
            )
            first = False
            if len(verdicts[scenario]) >= wanted:
                break


def onset_of(shape: Shape, free: np.ndarray, step: StepTimes, scenario: int, fault: FleetFault) -> float | None:
    """When a hang struck; None when another one kept the job from coming so far. ``free``: the clock's before the step."""
    rank = fault.link[0] if fault.link else fault.ranks[0]
    home = shape.place(rank)
    moments, stuck_in = [float(free[home[0], scenario, home[1], home[2]])], []
    for p, (name, ops) in ((shape.place(rank), pair) for pair in step.ops.items()):
        first = p[0] - 1 if name in ("forward_recv", "backward_send") else p[0]
        if not 0 <= first < len(ops.enter):
            continue
        enter, end = ops.enter[first, :, scenario, p[1], p[2]], ops.end[first, :, scenario, p[1], p[2]]
        moments += end[np.isfinite(end)].tolist()
        stuck_in += [(name, first, int(at)) for at in np.flatnonzero(np.isfinite(enter) & ~np.isfinite(end))]
    if not (fault.link or fault.inside or fault.kind is Injected.MISMATCH):
        return None if stuck_in else max(moments) + 5e-3
    for name, first, at in stuck_in:
        table = step.ops[name].enter[first, at, scenario]
        members = (
            table[shape.place(rank)[1]]
            if name == "tp"
            else table[:, shape.place(rank)[2]]
            if name == "dp"
            else table[p[1:]]
        )
        if np.isfinite(members).all() and name in ("tp", "dp", "forward_send", "backward_send"):
            return float(np.max(members))
    return None


def _repeat(step: StepTimes, count: int) -> StepTimes:
    def many(table: np.ndarray) -> np.ndarray:
        return np.broadcast_to(table[:, :, :1], (*table.shape[:2], count, *table.shape[3:]))

    ops = {name: type(one)(many(one.enter), many(one.end), many(one.work)) for name, one in step.ops.items()}
    return StepTimes(ops, {name: many(one) for name, one in step.transfer.items()})
