"""Many trials over several jobs: how often class and culprit are right, with confusion and interval. Deterministic by seed."""

from __future__ import annotations

import math
import multiprocessing
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from actors.c4.diagnosis.verdict import Verdict
from apps.c4.fleet.clockwork import Pace
from apps.c4.fleet.faults import CLASSES, FleetFault, draw_fault, draw_pair
from apps.c4.fleet.shape import shape_for
from apps.c4.fleet.trial import HealthyJob, Trial, matches, run_trials

Progress = Callable[[int, int], None]
"""Called with (trials done, right)."""


@dataclass(frozen=True)
class Plan:
    """What a campaign does."""

    ranks: int = 1024
    faults: int = 1000
    pairs: bool = False
    """Two faults of different classes at once in each trial."""
    slowdown: tuple[float, float] = (1.5, 4.0)
    noise: float = 0.10
    seed: int = 0
    trials_per_job: int = 50
    """Trials that fork from one healthy job; the next job has another seed, and every third one has experts (MoE)."""
    side_by_side: int = 10
    """Trials simulated at once, as memory allows."""
    processes: int = 1


@dataclass(frozen=True)
class CampaignResult:
    """All trials of a campaign."""

    plan: Plan
    trials: tuple[Trial, ...]
    false_alarms: tuple[Verdict, ...]
    """Named in the jobs' healthy steps before the faults."""
    healthy_steps: int

    @property
    def right(self) -> int:
        return sum(trial.right for trial in self.trials)

    @property
    def accuracy(self) -> float:
        """Share of trials with every fault's class and culprit right and nothing else named; a false alarm is a wrong trial."""
        return max(0.0, (self.right - len(self.false_alarms)) / max(len(self.trials), 1))

    def of_class(self, name: str) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.trials if any(fault.fault_class == name for fault in trial.faults))

    def confusion(self) -> dict[tuple[str, str], int]:
        """How often a fault of a class (first) was called what (second): its class, or that of what was named in its place."""
        counts: Counter[tuple[str, str]] = Counter()
        for trial in self.trials:
            strangers = [v for v in trial.verdicts if not any(matches(v, fault) for fault in trial.faults)]
            for fault in trial.faults:
                if any(matches(verdict, fault) for verdict in trial.verdicts):
                    said = fault.fault_class
                elif same := [v for v in strangers if v.fault_class.value == fault.fault_class]:
                    said = f"{same[0].fault_class.value}, other culprit"
                else:
                    said = strangers[0].fault_class.value if strangers else "nothing"
                counts[fault.fault_class, said] += 1
        return dict(counts)


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Bounds of a share (Wilson score interval, 95 % by default); (0, 1) without trials."""
    if not count:
        return 0.0, 1.0
    share = right / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def run_campaign(plan: Plan, progress: Progress | None = None) -> CampaignResult:
    """Runs the plan; the same plan gives the same trials, whatever the number of processes.

    Raises:
        ValueError: no shape has that many ranks.
    """
    shape_for(plan.ranks)
    jobs = [
        (plan, index, min(plan.trials_per_job, plan.faults - first))
        for index, first in enumerate(range(0, plan.faults, plan.trials_per_job))
    ]
    parts: list[tuple[list[Trial], list[Verdict], int]] = []

    def take(part: tuple[list[Trial], list[Verdict], int]) -> None:
        parts.append(part)
        if progress is not None:
            done = [trial for trials, _, _ in parts for trial in trials]
            progress(len(done), sum(trial.right for trial in done))

    if plan.processes > 1 and len(jobs) > 1:
        # Spawned, not forked: the caller may have threads.
        with ProcessPoolExecutor(plan.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            for part in pool.map(_run_job, jobs):
                take(part)
    else:
        for job in jobs:
            take(_run_job(job))
    return CampaignResult(
        plan, tuple(trial for trials, _, _ in parts for trial in trials),
        tuple(verdict for _, alarms, _ in parts for verdict in alarms), sum(steps for _, _, steps in parts),
    )  # fmt: skip


def _run_job(job: tuple[Plan, int, int]) -> tuple[list[Trial], list[Verdict], int]:
    plan, index, count = job
    shape = shape_for(plan.ranks, expert=index % 3 == 2)
    seed = 1000 * plan.seed + index
    healthy = HealthyJob(shape, Pace(noise=plan.noise), seed)
    rng = np.random.default_rng([plan.seed, index])
    trials: list[Trial] = []
    batch = 0
    while len(trials) < count:
        wanted = min(plan.side_by_side, count - len(trials))
        drawn = sorted((_draw(plan, shape, rng) for _ in range(wanted)), key=lambda faults: faults[0].kind.is_hang)
        # Slow ones and hangs take different courses: side by side only with their like, unless they come in pairs.
        sets = [drawn] if plan.pairs else [[f for f in drawn if f[0].kind.is_hang is hang] for hang in (False, True)]
        for part in sets:
            if part:
                ran = run_trials(healthy, part, seed * 100 + batch, through_nodes=batch % 10 == 0)
                # A hang may come too late: the job stands already. Then there is one fault, and another pair is drawn.
                trials += [trial for trial in ran if not any(math.isnan(onset) for onset in trial.onsets_s)]
                batch += 1
    return trials, healthy.false_alarms, healthy.steps


def _draw(plan: Plan, shape, rng: np.random.Generator) -> tuple[FleetFault, ...]:  # type: ignore[no-untyped-def]
    if plan.pairs:
        return draw_pair(shape, rng, plan.slowdown)
    kinds: Sequence = list(CLASSES.values())[int(rng.integers(len(CLASSES)))]
    return (draw_fault(shape, rng, kinds[int(rng.integers(len(kinds)))], plan.slowdown),)
