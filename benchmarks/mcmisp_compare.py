"""Does guidance help: arms over paired seeds at equal tokens, with the controls that could show that it does not.

``python -m benchmarks.mcmisp_compare [--quick] [--blimp PATH] [--seeds N] [--steps N]``. Every arm shares with plain, seed by
seed, first weights, rows and masks. The full form takes hours on 2 cores; its result stays in benchmarks/results.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from actors.cluster.session import RayConfig, ray_session
from apps.mcmisp.comparison import TrialResult, arm_results, run_trial, run_trials
from apps.mcmisp.config import ARMS
from apps.mcmisp.data.prepare import prepare
from apps.mcmisp.pictures import band_picture
from benchmarks.harness import REPOSITORY, Benchmark, Target, print_rows
from benchmarks.mcmisp.settings import settings

TARGETS = [
    Target(
        "steps_to_loss_ratio", 99.0, 0.85, "lower", "guided / plain, mean over paired seeds; reported whatever it is"
    ),
    Target("steps_to_loss_ratio_high", 99.0, 1.0, "lower", "upper end of its 95 % interval"),
]
TOKENS = 3_000_000


def main() -> int:
    """Runs every arm; returns the exit code."""
    options: dict[str, dict[str, Any]] = {
        "--blimp": {"type": Path, "help": "folder or archive of BLiMP; default: shared data beside the repository"},
        "--seeds": {"type": int, "default": None, "help": "paired seeds (5; quick: 2)"},
        "--steps": {"type": int, "default": None, "help": "steps of each run (3 M tokens; quick: 24)"},
        "--at-once": {"type": int, "default": 2, "help": "runs at a time"},
    }
    bench = Benchmark("mcmisp_compare", __doc__ or "", TARGETS, options=options)
    arguments, quick = bench.arguments, bench.quick
    steps = arguments.steps or (24 if quick else -(-TOKENS // (32 * 128)))
    seeds = list(range(arguments.seeds or (2 if quick else 5)))
    arms = ["plain", "guided", "random"] if quick else list(ARMS)
    shared = REPOSITORY.parent / "shared" / "data" / "text" / "blimp_47.tar.xz"
    blimp = arguments.blimp or (shared if shared.exists() else None)
    if blimp is None:
        bench.say("no BLiMP: give --blimp; get it from github.com/alexwarstadt/blimp")
    every = max(1, steps // (4 if quick else 40))
    config = settings(
        quick, model={"size": "nano"}, data={"vocab_size": 4096},
        training={"steps": steps, "evaluate_every": every, "evaluation_rows": 64 if quick else 512, "report_every": every},
        guidance={"start_error_rate": 0.99 if quick else 0.9, "warmup_steps": 4 if quick else 50},
        evaluation={"blimp": str(blimp) if blimp else None, "blimp_pairs": 2 if quick else 50},
        compare={"arms": arms, "seeds": seeds, "trials_at_once": arguments.at_once},
    )  # fmt: skip
    rows = prepare(config.data, told=bench.say)
    trials: list[TrialResult] = []

    def told(trial: TrialResult) -> None:
        trials.append(trial)
        bench.say(f"{len(trials)}/{len(arms) * len(seeds)} {trial.arm}, seed {trial.seed}: loss {trial.final_loss:.4f}")

    if quick:
        for seed in seeds:
            for arm in config.compare.arms:
                told(run_trial(config, arm, seed, rows))
    else:
        with ray_session(RayConfig(address="local", num_cpus=arguments.at_once, log_to_driver=False)):
            run_trials(config, rows, bench.out, told)
    report(bench, config, trials)
    return bench.finish()


def report(bench: Benchmark, config: Any, trials: list[TrialResult]) -> None:
    """Figures, rows and pictures."""
    for one in arm_results(config, trials):
        suffix = "" if one.arm == "guided" else f"_{one.arm}"
        if one.arm != "plain":
            bench.figure(f"steps_to_loss_ratio{suffix}", one.steps_ratio.value)
            bench.figure(f"steps_to_loss_ratio_low{suffix}", one.steps_ratio.low)
            bench.figure(f"steps_to_loss_ratio_high{suffix}", one.steps_ratio.high)
            bench.figure(f"final_loss_difference{suffix}", one.loss_difference.value)
        blimp = [t.blimp for t in trials if t.arm == one.arm and t.blimp is not None]
        if blimp:
            bench.figure(f"blimp_{one.arm}", sum(blimp) / len(blimp))
        bench.row(
            arm=one.arm, seeds=one.steps_ratio.seeds, final_loss=sum(one.losses) / len(one.losses),
            steps_ratio=_cell(one.steps_ratio),
            time_ratio=_cell(one.time_ratio), loss_difference=_cell(one.loss_difference),
            blimp_difference=_cell(one.blimp_difference) if one.blimp_difference else None,
        )  # fmt: skip
    print_rows("arms against plain, means over seeds [95 %]", bench.rows)
    runs: dict[str, list] = {}
    for trial in trials:
        runs.setdefault(trial.arm, []).append(trial.history)
    bench.picture(band_picture(runs, "step", "step"), "steps")
    bench.picture(band_picture(runs, "seconds", "seconds of training"), "time")
    for trial in trials:
        course = [(e["step"], e["validation_loss"]) for e in trial.history if "validation_loss" in e]
        bench.row(
            part="course", arm=trial.arm, seed=trial.seed, blimp=trial.blimp, step_ms=trial.step_s * 1e3, course=course
        )


def _cell(interval: Any) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


if __name__ == "__main__":
    sys.exit(main())
