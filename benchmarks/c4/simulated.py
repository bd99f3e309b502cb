"""The diagnosis on simulated fleets: accuracy at 1,024 and 10,000 ranks, with two faults at once, and the time of a verdict."""

from __future__ import annotations

import os
import statistics
import time

from actors.c4.diagnosis.diagnose import diagnose
from actors.c4.diagnosis.memory import DiagnosisMemory
from actors.c4.diagnosis.observation import Observation, merge
from actors.c4.diagnosis.settings import DiagnosisSettings
from apps.c4.fleet.campaign import CampaignResult, Plan, run_campaign, wilson
from apps.c4.fleet.clockwork import Pace, effects_of
from apps.c4.fleet.faults import CLASSES, FleetFault, Injected
from apps.c4.fleet.observe import Struck, split
from apps.c4.fleet.shape import shape_for
from apps.c4.fleet.trial import HealthyJob, onset_of
from benchmarks.harness import Benchmark


def run_simulated(bench: Benchmark) -> None:
    """All four figures, with a row for each class."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    chosen = plans(bench.quick, bench.arguments.seed, min(cores, 8), bench.arguments.faults_10000)
    for key, plan in chosen.items():
        bench.say(f"{key}: {plan.faults} trials at {plan.ranks} ranks")
        result = run_campaign(plan, lambda done, right: bench.say(f"  {done} trials, {right} right"))
        bench.figure(key, result.accuracy)
        add_rows(bench, key, result)
    bench.say("time of a verdict at 10,000 ranks")
    worst, rows = verdict_seconds(10_000, repeats=3 if bench.quick else 7)
    bench.figure("master_verdict_s_10000_ranks", worst)
    for row in rows:
        bench.row(part="verdict time", **row)


def plans(quick: bool, seed: int, processes: int, faults_10000: int | None = None) -> dict[str, Plan]:
    """What is run for each figure; ``faults_10000``: other than the usual number at 10,000 ranks, which take hours."""
    return {
        "sim_accuracy_1024": Plan(1024, 120 if quick else 1000, seed=seed, processes=processes,
                                  trials_per_job=30 if quick else 50),
        "sim_accuracy_10000": Plan(10_000, faults_10000 or (8 if quick else 1000), seed=seed + 1, processes=processes,
                                   side_by_side=2, trials_per_job=4 if quick else 50),
        "sim_two_faults_accuracy": Plan(1024, 40 if quick else 400, pairs=True, seed=seed + 2, processes=processes,
                                        trials_per_job=20 if quick else 50),
    }  # fmt: skip


def add_rows(bench: Benchmark, key: str, result: CampaignResult) -> None:
    """A row for each class, and one for the healthy steps."""
    for name in CLASSES:
        trials = result.of_class(name)
        right = sum(trial.right for trial in trials)
        low, high = wilson(right, len(trials))
        bench.row(part=key, fault=name, trials=len(trials), right=right, low=round(low, 4), high=round(high, 4))
    low, high = wilson(result.right, len(result.trials))
    bench.row(
        part=key, fault="all", trials=len(result.trials), right=result.right, low=round(low, 4), high=round(high, 4)
    )
    bench.row(part=key, fault="false alarms", trials=result.healthy_steps, right=len(result.false_alarms))


def verdict_seconds(ranks: int = 10_000, repeats: int = 5) -> tuple[float, list[dict[str, object]]]:
    """Seconds from the nodes' reports to the verdicts (merge and diagnose; one thread, no torch): median of the slowest look.

    Three kinds: healthy, a slow rank that is named, a stuck rank that is named. The busiest groups' histories are full, and
    every report brings the new blocks of a whole step.
    """
    shape = shape_for(ranks)
    job = HealthyJob(shape, Pace(), seed=3)
    looks: dict[str, tuple[list[Observation], DiagnosisMemory, int]] = {}
    slow = FleetFault(Injected.WORK_SLOW, (ranks // 2 + 3,), factor=2.0)
    stuck = FleetFault(Injected.STUCK, (ranks // 2 + 3,), wave=5)
    for name, fault, expected in (("healthy", None, 0), ("slow rank", slow, 1), ("stuck rank", stuck, 1)):
        clock, memory, last, index = job.clock.fork(1, 5), job.memory, job.last, job.steps
        for _ in range(6):
            free = clock.free.copy()
            step = clock.step(effects_of(shape, [[fault] if fault else []]))
            hangs = fault is not None and fault.kind.is_hang
            onset = onset_of(shape, free, step, 0, fault) if hangs and fault else None
            at_s = float(clock.free.max()) + 1e-6 if onset is None else onset + 8 * job.step_s
            struck = [Struck(fault, onset)] if fault and onset is not None else []
            seen = job.reporter.observe(
                0, at_s, last, step, index - 1, job.step_s, [(index, step)], struck, links=hangs
            )
            said, after = diagnose(seen, memory, DiagnosisSettings())
            if len(said) == expected and (expected or index > job.steps + 1):
                looks[name] = (split(seen), memory, expected)
                break
            memory, last, index = after, step, index + 1
    rows: list[dict[str, object]] = []
    medians = []
    for name, (reports, memory, expected) in looks.items():
        merging, judging = [], []
        for _ in range(repeats):
            began = time.perf_counter()
            whole = merge(reports, reports[0].at_s)
            between = time.perf_counter()
            said, _ = diagnose(whole, memory, DiagnosisSettings())
            judging.append(time.perf_counter() - between)
            merging.append(between - began)
            if len(said) != expected:
                raise RuntimeError(f"The look {name!r} named {len(said)} faults, not {expected}.")
        total = statistics.median(a + b for a, b in zip(merging, judging, strict=True))
        medians.append(total)
        rows.append({"look": name, "ranks": ranks, "blocks": len(whole.blocks.rank) + len(whole.link_blocks.block),
                     "merge_s": round(statistics.median(merging), 4), "diagnose_s": round(statistics.median(judging), 4),
                     "total_s": round(total, 4)})  # fmt: skip
    if len(looks) < 3:
        raise RuntimeError(f"Only the looks {sorted(looks)} came about.")
    return max(medians), rows
