"""The verb ``compare``: arms over paired seeds through Ray Tune, with pictures and intervals."""

from __future__ import annotations

from collections.abc import Sequence

from actors.cluster.session import ray_session
from apps.mcmisp.comparison import ArmResult, TrialResult, arm_results, run_trials
from apps.mcmisp.config import McmispConfig
from apps.mcmisp.data.prepare import prepare
from apps.mcmisp.pictures import band_picture
from apps.mcmisp.statistics import Interval
from apps.mcmisp.verbs import say
from apps.program.errors import UserError
from apps.program.report import Report, print_table
from apps.program.run_folder import new_run_folder

COLUMNS = [
    "arm",
    "steps to plain's loss / plain's",
    "time to it / plain's",
    "final loss - plain's",
    "BLiMP - plain's, points",
]


def compare(config: McmispConfig) -> None:
    """Trains ``compare.arms`` with ``compare.seeds`` and compares each with the plain arm, seed by seed."""
    if "plain" not in config.compare.arms:
        raise UserError("compare.arms must hold plain: every arm is compared with it.")
    folder = new_run_folder("mcmisp", config=config)
    rows = prepare(config.data, told=say)
    count = len(config.compare.arms) * len(config.compare.seeds)
    done: list[TrialResult] = []

    def told(trial: TrialResult) -> None:
        done.append(trial)
        say(f"{len(done)}/{count}: {trial.arm}, seed {trial.seed}: validation loss {trial.final_loss:.4f}")

    say(f"{count} trials of {config.training.steps:,} steps")
    with ray_session(config.ray):
        trials = run_trials(config, rows, folder.path, told)
    results = arm_results(config, trials)
    write_comparison_report(results, trials).write(folder)
    folder.write_result({"arms": results, "trials": trials})
    print_table(COLUMNS, table_rows(results), title=str(folder))


def table_rows(results: Sequence[ArmResult]) -> list[list[str]]:
    """Cells of the comparison's table."""

    def cell(interval: Interval | None) -> str:
        return "–" if interval is None else f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"

    return [
        [r.arm, cell(r.steps_ratio), cell(r.time_ratio), cell(r.loss_difference), cell(r.blimp_difference)]
        for r in results
    ]


def write_comparison_report(results: Sequence[ArmResult], trials: Sequence[TrialResult]) -> Report:
    """Curves with bands, and the table."""
    report = Report(
        "McMisP: arms over paired seeds", "random and reversed are controls: if they help too, guidance is not why."
    )
    runs: dict[str, list] = {}
    for trial in trials:
        runs.setdefault(trial.arm, []).append(trial.history)
    report.add_figure("Loss against steps", band_picture(runs, "step", "step"))
    report.add_figure("Loss against time", band_picture(runs, "seconds", "seconds of training"))
    report.add_table("Arms", COLUMNS, table_rows(results), "Means over seeds with 95 % bootstrap intervals.")
    return report


__all__ = ["COLUMNS", "compare", "table_rows", "write_comparison_report"]
