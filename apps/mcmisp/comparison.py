"""Paired seeds over arms: the trials, under Ray Tune or one after another, and the table of what each arm gained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from apps.mcmisp.config import Arm, McmispConfig
from apps.mcmisp.data.shards import PackedRows
from apps.mcmisp.evaluation.blimp import accuracy, blimp_scores, read_blimp
from apps.mcmisp.statistics import Interval, paired_difference, steps_to_loss_ratio
from apps.mcmisp.tables import table_of
from apps.mcmisp.training.fit import fit_here
from apps.program.errors import UserError
from apps.training.worker import LocalWorker, RayTuneWorker, Worker


@dataclass(frozen=True)
class TrialResult:
    """One arm with one seed. ``blimp``: percent, when it was asked for."""

    arm: Arm
    seed: int
    history: list[dict[str, float]]
    step_s: float
    blimp: float | None = None

    @property
    def final_loss(self) -> float:
        return [e["validation_loss"] for e in self.history if "validation_loss" in e][-1]


@dataclass(frozen=True)
class ArmResult:
    """An arm against the plain one, over paired seeds."""

    arm: Arm
    steps_ratio: Interval
    time_ratio: Interval
    loss_difference: Interval
    blimp_difference: Interval | None
    losses: list[float] = field(default_factory=list)


def run_trial(config: McmispConfig, arm: Arm, seed: int, rows: PackedRows, worker: Worker | None = None) -> TrialResult:
    """Trains one arm with one seed; all arms with a seed share first weights, rows and uniform masks."""
    trained = fit_here(config.for_arm(arm, seed), rows, None, worker=worker or LocalWorker())
    blimp = None
    if config.evaluation.blimp is not None:
        pairs = read_blimp(config.evaluation.blimp, config.evaluation.blimp_pairs)
        blimp = accuracy(blimp_scores(trained.model, rows.tokenizer(), pairs, torch.device("cpu")))
    return TrialResult(arm, seed, trained.history, trained.step_s, blimp)


def run_trials(
    config: McmispConfig, rows: PackedRows, folder: Path, told: Callable[[TrialResult], None]
) -> list[TrialResult]:
    """Every arm with every seed under Ray Tune, ``trials_at_once`` at a time. Ray must run.

    Raises:
        UserError: a trial failed; the text is its own.
    """
    from ray import tune

    table_of(rows, config.cooccurrence)  # counted once, not by every trial
    space = {
        "arm_seed": tune.grid_search([(arm, seed) for seed in config.compare.seeds for arm in config.compare.arms]),
        "config": config.model_dump_json(), "rows": str(rows.folder),
    }  # fmt: skip
    tuner = tune.Tuner(
        tune.with_resources(_trial, {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(max_concurrent_trials=config.compare.trials_at_once),
        run_config=tune.RunConfig(name="compare", storage_path=str(folder.absolute()), verbose=0),
    )
    results = []
    for one in tuner.fit():
        if one.error is not None:
            inner = one.error
            while getattr(inner, "cause", None) or inner.__cause__:
                inner = getattr(inner, "cause", None) or inner.__cause__
            raise UserError(f"A trial failed: {str(inner).strip().splitlines()[-1]}")
        result = TrialResult(**one.metrics["trial"])
        told(result)
        results.append(result)
    return results


def _trial(space: dict[str, Any]) -> None:
    from dataclasses import asdict

    from ray import tune

    config = McmispConfig.model_validate_json(space["config"])
    arm, seed = space["arm_seed"]
    worker = RayTuneWorker()
    result = run_trial(config, arm, seed, PackedRows(Path(space["rows"])), worker)
    tune.report({"trial": asdict(result), "validation_loss": result.final_loss})


def arm_results(config: McmispConfig, trials: Sequence[TrialResult]) -> list[ArmResult]:
    """Each arm against plain.

    Raises:
        UserError: there is no plain arm to compare with.
    """
    by_arm: dict[Arm, dict[int, TrialResult]] = {}
    for trial in trials:
        by_arm.setdefault(trial.arm, {})[trial.seed] = trial
    if "plain" not in by_arm:
        raise UserError("compare.arms must hold plain: every arm is compared with it.")
    plain, draws, quantile = by_arm["plain"], config.compare.bootstrap, config.compare.target_quantile
    found = []
    for arm, runs in by_arm.items():
        mine, theirs = ({s: t.history for s, t in x.items()} for x in (runs, plain))
        blimp = None
        if all(t.blimp is not None for t in (*runs.values(), *plain.values())):
            blimp = paired_difference(*({s: float(t.blimp or 0) for s, t in x.items()} for x in (runs, plain)), draws)
        found.append(
            ArmResult(
                arm, steps_to_loss_ratio(mine, theirs, quantile, draws),
                steps_to_loss_ratio(mine, theirs, quantile, draws, against="seconds"),
                paired_difference(*({s: t.final_loss for s, t in x.items()} for x in (runs, plain)), draws), blimp,
                [t.final_loss for t in runs.values()],
            )
        )  # fmt: skip
    return found


__all__ = ["ArmResult", "TrialResult", "arm_results", "run_trial", "run_trials"]
