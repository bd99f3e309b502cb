"""Where a job runs: in this process, or on workers of Ray Train under C4, which isolates faulty ones and goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from apps.balanced_sparsity.store import MODEL_FILE, Trained, load_trained, save_trained
from apps.balanced_sparsity.training.loop import Job, run
from apps.program.errors import UserError
from apps.training.worker import LocalWorker, RayTrainWorker

Told = Callable[[dict[str, Any]], None]
RAY_RUN = "run"
"""Name of the run below the storage folder: a later fit with the same storage goes on from its newest checkpoint."""


def fit(job: Job, folder: Path, told: Told | None = None) -> Trained:
    """Does ``job`` on as many workers as it wants, from the newest checkpoint in ``folder`` if there is one.

    Writes ``model.pt`` there; ``told`` is called with each report.

    Raises:
        UserError: see ``loop.run``; or the training failed under Ray, with what failed.
    """
    trained = _fit_here(job, folder, told) if job.config.training.workers == 0 else _fit_on_ray(job, folder, told)
    save_trained(folder / MODEL_FILE, trained)
    return trained


def train_loop(config: dict[str, Any]) -> None:
    """Ray Train's loop. ``config``: ``job``, a ``Job``."""
    job: Job = config["job"]
    torch.set_num_threads(job.config.training.threads)
    run(job, RayTrainWorker())


def _fit_here(job: Job, folder: Path, told: Told | None) -> Trained:
    training = job.config.training
    if training.gpu and not torch.cuda.is_available():
        raise UserError("training.gpu is set, but this process sees no GPU.")
    before = torch.get_num_threads()
    torch.set_num_threads(training.threads)
    try:
        return run(job, LocalWorker(folder / "checkpoints", "cuda" if training.gpu else "cpu", told))
    finally:
        torch.set_num_threads(before)


def _fit_on_ray(job: Job, folder: Path, told: Told | None) -> Trained:
    """Ray must be initialised."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

    from actors.c4.trainer import C4Trainer
    from apps.training.progress import ReportLog, followed

    training = job.config.training
    log = folder.absolute() / "reports.jsonl"
    trainer = C4Trainer(
        train_loop,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=training.workers,
            use_gpu=training.gpu,
            resources_per_worker={"CPU": training.threads, **({"GPU": 1} if training.gpu else {})},
        ),
        run_config=RunConfig(
            name=RAY_RUN,
            storage_path=training.storage or str(folder.absolute() / "ray"),
            failure_config=FailureConfig(max_failures=training.max_failures),
            callbacks=[ReportLog(str(log))],
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(training.threads)}},
        ),
    )
    with followed(log, told or _silent):
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise UserError(f"The training failed: {_why(error)}") from error
    if result.checkpoint is None:
        raise UserError(f"The training ended without a checkpoint; {folder} holds what was reported.")
    with result.checkpoint.as_directory() as found:
        return load_trained(Path(found) / MODEL_FILE)


def _why(error: BaseException) -> str:
    """The sentence of the user's mistake inside of what Ray Train raised, or the last line of it."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, UserError):
            return str(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    mistakes = [line.split("UserError: ", 1)[1] for line in lines if "UserError: " in line]
    return mistakes[-1] if mistakes else (lines[-1] if lines else type(error).__name__)


def _silent(entry: dict[str, Any]) -> None:
    """Nobody wants to know."""
