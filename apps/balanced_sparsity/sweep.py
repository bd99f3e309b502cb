"""The sweep: pattern x sparsity x block size as trials of Ray Tune, each pruning the same trained network; resumable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apps.balanced_sparsity.config import BalancedSparsityConfig, SweepConfig
from apps.balanced_sparsity.pictures import TrialResult
from apps.balanced_sparsity.pruning.patterns import Pattern
from apps.balanced_sparsity.store import MODEL_FILE, Trained, load_trained
from apps.balanced_sparsity.training.loop import Job, run
from apps.program.errors import UserError
from apps.training.worker import RayTuneWorker

EXPERIMENT = "sweep"


@dataclass(frozen=True)
class Trial:
    """A point of the grid."""

    pattern: str
    sparsity: float
    seed: int


def grid(sweep: SweepConfig) -> list[Trial]:
    """The trials, in the order of the configuration.

    Raises:
        UserError: a block size or a pattern that there is not.
    """
    patterns: list[str] = []
    for family in sweep.patterns:
        if family == "balanced":
            patterns += [f"balanced:{size}" for size in sweep.balanced_blocks]
        elif family == "block":
            patterns += [f"block:{size}" for size in sweep.block_sizes]
        else:
            patterns.append(family)
    for pattern in patterns:
        try:
            Pattern.parse(pattern)
        except ValueError as error:
            raise UserError(f"sweep: {error}") from error
    if not patterns:
        raise UserError("sweep.balanced_blocks and sweep.block_sizes name no size for the patterns in sweep.patterns.")
    return [Trial(pattern, value, seed) for seed in sweep.seeds for pattern in patterns for value in sweep.sparsities]


def job_of(config: BalancedSparsityConfig, trial: Trial, start: str | None) -> Job:
    """The pruning that a trial is."""
    pruning = config.pruning.model_copy(update={"pattern": trial.pattern, "sparsity": trial.sparsity})
    training = config.training.model_copy(update={"seed": trial.seed})
    return Job(config.model_copy(update={"pruning": pruning, "training": training}), prune=True, start=start)


def run_trial(config: dict[str, int], base: BalancedSparsityConfig, start: str | None) -> None:
    """Tune's trainable. ``config``: ``trial``, a number in the grid."""
    torch.set_num_threads(base.training.threads)
    on_gpu = base.sweep.gpus_per_trial > 0 and torch.cuda.is_available()
    run(job_of(base, grid(base.sweep)[config["trial"]], start), RayTuneWorker("cuda" if on_gpu else "cpu"))


def run_sweep(
    config: BalancedSparsityConfig, start: str | None, storage: Path, resume: bool = False
) -> list[tuple[TrialResult, Trained]]:
    """Runs the grid, or what an interrupted sweep in ``storage`` left of it; Ray must be initialised.

    Returns:
        Each trial's result and pruned network, in the order of the grid.

    Raises:
        UserError: a trial failed (the others are kept), or there is nothing to resume.
    """
    from ray import tune

    trials = grid(config.sweep)
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, base=config, start=start),
        {"cpu": config.sweep.cpus_per_trial, "gpu": config.sweep.gpus_per_trial},
    )
    path = str(storage.absolute() / EXPERIMENT)
    if resume:
        if not tune.Tuner.can_restore(path):
            raise UserError(f"{storage} holds no sweep that can be resumed.")
        tuner = tune.Tuner.restore(path, trainable=trainable, resume_unfinished=True, resume_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search(list(range(len(trials))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=config.sweep.concurrent),
            run_config=tune.RunConfig(name=EXPERIMENT, storage_path=str(storage.absolute()), verbose=0),
        )
    return _collected(tuner.fit(), trials, storage)


def _collected(results: Any, trials: Sequence[Trial], storage: Path) -> list[tuple[TrialResult, Trained]]:
    found: dict[int, tuple[TrialResult, Trained]] = {}
    failures: list[str] = []
    for result in results:
        if result.error is not None or result.checkpoint is None:
            text = str(result.error or "it ended without a checkpoint").strip().splitlines()[-1]
            failures.append(text.rpartition("UserError: ")[2])
            continue
        number = result.config["trial"]
        with result.checkpoint.as_directory() as folder:
            trained = load_trained(Path(folder) / MODEL_FILE)
        trial, seconds = trials[number], float(result.metrics.get("time_total_s", 0.0))
        told = TrialResult(
            trial.pattern, trial.sparsity, trained.sparsity, trial.seed, trained.figures[trained.score], seconds
        )
        found[number] = (told, trained)
    if failures:
        raise UserError(
            f"{len(failures)} of {len(trials)} trials failed ({failures[0]}); the others are kept: sweep --resume {storage}."
        )
    return [found[number] for number in sorted(found)]
