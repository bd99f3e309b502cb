"""Fault to first new step: C4Trainer against Ray Train's default recovery, on the same loop, cluster and faults.

``python -m benchmarks.c4_recovery [--quick]``: four workers on a virtual cluster of six one-CPU nodes on this machine (two
are spares), digits, a checkpoint reported every step. Faults: SIGKILL, SIGSTOP, GIL lock, at ranks in turn. Between trials the
nodes are "repaired" and the warm processes are given time. The default's hang time-out is 600 s: its hang trial stops at a cap.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.c4.recovery import (
    FAULTS,
    Fit,
    Records,
    Trial,
    c4_trainer,
    default_trainer,
    repair,
    virtual_cluster,
    wait_until_warm,
)
from benchmarks.harness import Benchmark, Target, print_rows

WORLD_SIZE = 4
NODES = 6
CAP_S = 120.0
TARGETS = [
    Target("recovery_p50_s", 15, 8, "lower", "fault to first new step ended on all ranks; SIGKILL and hang mixed"),
    Target("recovery_p95_s", 25, 10, "lower", "the same"),
    Target("steps_lost_max", 1, 0, "lower", "steps ended on all ranks and done again"),
    Target("loss_curve_max_abs_diff", 0, 0, "lower", "every rank's loss of every step against the unbroken run"),
    Target("survivors_max", 0, 0, "lower", "processes of a fenced generation that still live after recovery"),
]


def main() -> int:
    """Runs everything; returns the exit code."""
    options: dict[str, dict[str, Any]] = {
        "--trials": {"type": int, "default": None, "help": "faults under C4 (default 20; quick: 3)"},
        "--hang-cap": {
            "type": float,
            "default": None,
            "help": "seconds after which the default's hang trial is stopped",
        },
        "--only": {"choices": ("c4", "default"), "help": "one part alone"},
    }
    bench = Benchmark("c4_recovery", __doc__ or "", TARGETS, options=options)
    trials = bench.arguments.trials or (3 if bench.quick else 20)
    cap_s = bench.arguments.hang_cap or (15.0 if bench.quick else 120.0)
    with tempfile.TemporaryDirectory(prefix="c4-recovery-") as name, virtual_cluster(NODES):
        bench.say(f"cluster of {NODES} nodes is up")
        scratch = Path(name)
        if bench.arguments.only in (None, "c4"):
            hurt_c4(bench, scratch, trials)
        if bench.arguments.only in (None, "default"):
            # Last: the cluster ends with it.
            hurt_default(bench, scratch, 1 if bench.quick else 5, cap_s)
    print_rows("recovery", bench.rows)
    picture(bench)
    return bench.finish()


def hurt_c4(bench: Benchmark, scratch: Path, trials: int) -> None:
    """The faults under C4 in one fit, then the unbroken run of the same length."""
    done: list[Trial] = []
    with Fit(c4_trainer(WORLD_SIZE, scratch / "storage"), scratch / "hurt", WORLD_SIZE) as fit:
        for number in range(trials):
            fit.wait_for_steps(1)
            wait_until_warm(fit.trainer.c4_run, NODES, timeout_s=25.0 if bench.quick else 60.0)
            trial = fit.hurt(FAULTS[number % len(FAULTS)], (1 + number) % WORLD_SIZE, CAP_S)
            nodes = repair(fit)
            done.append(trial)
            bench.say(
                f"c4: {trial.fault} at rank {trial.rank}: {trial.recovered_s:.2f} s, {trial.steps_lost} steps lost"
            )
            bench.row(
                trainer="c4",
                fault=trial.fault,
                rank=trial.rank,
                recovered_s=trial.recovered_s,
                loop_started_s=trial.loop_started_s,
                steps_lost=trial.steps_lost,
                isolated=len(nodes),
                warm_workers=trial.warm_workers,
            )
    if fit.error is not None:
        raise fit.error
    _phases(bench, fit.result.c4)
    _figures(bench, done)
    steps = int((fit.folder / "stop").read_text())
    bench.say(f"the unbroken run of {steps} steps")
    with Fit(c4_trainer(WORLD_SIZE, scratch / "storage"), scratch / "unbroken", WORLD_SIZE, 0.0, steps) as unbroken:
        unbroken.join(timeout_s=600)
    if unbroken.error is not None:
        raise unbroken.error
    bench.figure("loss_curve_max_abs_diff", loss_difference(fit.records, unbroken.records, steps, trials))
    bench.figure("steps", steps)


def hurt_default(bench: Benchmark, scratch: Path, kills: int, cap_s: float) -> None:
    """Ray Train's own recovery: kills, then one hang up to the cap."""
    done = []
    with Fit(default_trainer(WORLD_SIZE, scratch / "storage"), scratch / "default", WORLD_SIZE) as fit:
        for number, fault in enumerate([*["sigkill"] * kills, "sigstop"]):
            trial = fit.hurt(fault, (1 + number) % WORLD_SIZE, CAP_S if fault == "sigkill" else cap_s)
            done.append(trial)
            shown = f">= {cap_s:.0f}" if trial.capped else f"{trial.recovered_s:.2f}"
            bench.say(f"default: {fault} at rank {trial.rank}: {shown} s, {trial.steps_lost} steps lost")
            bench.row(
                trainer="default",
                fault=fault,
                rank=trial.rank,
                recovered_s=trial.recovered_s,
                loop_started_s=trial.loop_started_s,
                steps_lost=trial.steps_lost,
                isolated=0,
                capped=trial.capped,
            )
        fit.abandoned = True  # its next restart takes long and says nothing more
    killed = [trial for trial in done if trial.fault == "sigkill"]
    bench.figure("default_sigkill_p50_s", statistics.median(trial.recovered_s for trial in killed))
    bench.figure("default_sigkill_steps_lost_max", max(trial.steps_lost for trial in killed))
    bench.figure("default_hang_at_least_s", done[-1].recovered_s)


def loss_difference(hurt: Records, unbroken: Records, steps: int, trials: int) -> float:
    """Largest difference of a rank's loss in a step, over all that the hurt run computed (steps done twice, too).

    A fault may strike when a step is stored by all ranks and not yet in their records: one step a trial may be missing there.
    More missing steps are an infinite difference.
    """
    truth = {(step, rank): loss for step, pairs in unbroken.losses().items() for rank, loss in pairs}
    found = {
        (step, rank): loss for step, pairs in hurt.losses().items() for rank, loss in sorted(pairs) if step < steps
    }
    missing = [step for step in range(steps) if not any((step, rank) in found for rank in range(WORLD_SIZE))]
    if len(missing) > trials or not set(found) <= set(truth):
        return float("inf")
    return max(
        abs(loss - truth[step, rank]) for step, pairs in hurt.losses().items() if step < steps for rank, loss in pairs
    )


def _figures(bench: Benchmark, done: Sequence[Trial]) -> None:
    seconds = sorted(trial.recovered_s for trial in done)
    bench.figure("recovery_p50_s", statistics.median(seconds))
    bench.figure("recovery_p95_s", seconds[min(len(seconds) - 1, -(-95 * len(seconds) // 100) - 1)])
    bench.figure("steps_lost_max", max(trial.steps_lost for trial in done))
    bench.figure("survivors_max", max(trial.survivors for trial in done))
    bench.figure("trials", len(done))
    for fault in FAULTS:
        of_fault = [trial.recovered_s for trial in done if trial.fault == fault]
        if of_fault:
            bench.figure(f"recovery_{fault}_p50_s", statistics.median(of_fault))


def _phases(bench: Benchmark, outcome: Any) -> None:
    """Median time of each phase since the failure was seen by Ray Train's controller."""
    phases: dict[str, list[float]] = {}
    for restart in outcome.restarts:
        for phase, seconds in restart.phases_s:
            phases.setdefault(phase, []).append(seconds)
    for phase, values in phases.items():
        bench.figure(f"phase_{phase}_s", statistics.median(values))


def picture(bench: Benchmark) -> None:
    """A dot a trial: recovery by fault, C4 beside the default."""
    from apps.program.report import PALETTE, new_figure

    figure, axes = new_figure()
    kinds = list(dict.fromkeys((row["trainer"], row["fault"]) for row in bench.rows))
    for place, (trainer, fault) in enumerate(kinds):
        values = [row["recovered_s"] for row in bench.rows if (row["trainer"], row["fault"]) == (trainer, fault)]
        axes.plot([place] * len(values), values, "o", color=PALETTE[0 if trainer == "c4" else 1], alpha=0.7)
    axes.set_xticks(range(len(kinds)), [f"{trainer}\n{fault}" for trainer, fault in kinds])
    axes.set_ylabel("fault to first new step, s")
    axes.set_ylim(bottom=0)
    bench.picture(figure)


if __name__ == "__main__":
    sys.exit(main())
