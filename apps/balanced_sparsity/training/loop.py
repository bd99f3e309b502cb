"""The one training loop, with and without pruning, with and without Ray; resumed, it is bit for bit the unbroken one.

The state of a step: model, optimizer, sparsifier, the random generators, what the task carries, and the course so far. The
position in the data and the learning rate follow from the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.cluster.metrics import counter, gauge
from apps.balanced_sparsity.config import BalancedSparsityConfig
from apps.balanced_sparsity.pruning.patterns import Pattern
from apps.balanced_sparsity.pruning.schedule import GradualSchedule
from apps.balanced_sparsity.pruning.sparsifier import Sparsifier
from apps.balanced_sparsity.store import MODEL_FILE, Trained, load_trained, save_trained
from apps.balanced_sparsity.training.rates import learning_rate, make_optimizer
from apps.balanced_sparsity.training.tasks import Task, make_task
from apps.program.errors import UserError
from apps.training.checkpoint import read_checkpoint, write_checkpoint
from apps.training.position import mix
from apps.training.worker import Worker, bare

STEPS = counter("balanced_sparsity", "trained", "steps", help="Optimizer steps done.", tags=["rank"])
SPARSITY = gauge("balanced_sparsity", "pruned", "ratio", help="Share of zeros in the pruned weights.", tags=["rank"])
LOSS = gauge("balanced_sparsity", "loss", "ratio", help="Mean training loss since the last report.", tags=["rank"])


@dataclass(frozen=True)
class Job:
    """What is to be done: train from scratch, or prune what is in ``start`` (a model.pt; the speaker encoder needs none)."""

    config: BalancedSparsityConfig
    prune: bool = False
    start: str | None = None

    def steps(self, task: Task) -> int:
        """Optimizer steps of the whole job."""
        if self.prune:
            return self.config.pruning.steps
        training = self.config.training
        return training.steps if training.epochs is None else max(1, round(training.epochs * task.epoch_steps))


def run(job: Job, worker: Worker, task: Task | None = None) -> Trained:
    """Trains (or prunes and retrains) to the end, from the worker's newest checkpoint when there is one.

    The last report comes with a checkpoint whose folder holds ``model.pt``, too.

    Raises:
        UserError: data is missing, the start does not fit, or the training diverged.
    """
    return _Run(job, worker, task or make_task(job.config, worker)).to_the_end()


class _Run:
    """The state of one worker's loop."""

    def __init__(self, job: Job, worker: Worker, task: Task):
        self.job, self.worker, self.task, self.training = job, worker, task, job.config.training
        self.steps, self.step = job.steps(task), 0
        self.history: list[dict[str, float]] = []
        self.rate = (job.config.pruning.learning_rate if job.prune else None) or self.training.learning_rate
        torch.manual_seed(mix(self.training.seed))
        model = _start(job, task)
        self.sparsifier = _sparsifier(job.config) if job.prune else None
        # On the device before the sparsifier sees it: masks live where the weights do.
        model.to(worker.device)
        if self.sparsifier is not None:
            try:
                self.sparsifier.prepare(model)
            except ValueError as error:
                raise UserError(f"pruning.skip: {error}") from error
        self.wrapped = worker.prepare(model)
        self.optimizer = make_optimizer(self.training, self.wrapped.parameters())
        # From here on the ranks draw differently (dropout); the weights are already there.
        torch.manual_seed(mix(self.training.seed, worker.rank + 1))
        with worker.newest() as folder:
            if folder is not None:
                self._restore(folder)

    def to_the_end(self) -> Trained:
        losses: list[torch.Tensor] = []
        while self.step < self.steps:
            losses.append(self._one_step())
            self.step += 1
            if self.step < self.steps and self._due(self.training.report_every):
                self._report(losses, last=False)
                losses = []
        return self._report(losses, last=True)

    def _one_step(self) -> torch.Tensor:
        rate = learning_rate(self.training, self.rate, self.step, self.steps, self.task.epoch_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.wrapped.train()
        loss = self.task.loss(self.wrapped, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.training.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.wrapped.parameters(), self.training.clip_norm)
        self.optimizer.step()
        if self.sparsifier is not None:
            self.sparsifier.step()
        STEPS.increase(1, rank=str(self.worker.rank))
        return loss.detach()

    def _due(self, every: int | None) -> bool:
        """Whether a report is to be made after this step; evaluations and checkpoints are reports, too."""
        counts = (every, self.training.evaluate_every, self.training.checkpoint_every)
        return any(count is not None and self.step % count == 0 for count in counts)

    def _report(self, losses: list[torch.Tensor], last: bool) -> Trained:
        entry: dict[str, float] = {"step": self.step}
        if losses:
            entry["loss"] = float(self.worker.mean(torch.stack(losses).mean()))
            entry["learning_rate"] = learning_rate(
                self.training, self.rate, self.step - 1, self.steps, self.task.epoch_steps
            )
            if not math.isfinite(entry["loss"]):
                raise UserError(
                    f"The loss is not finite at step {self.step}: lower {'pruning' if self.job.prune else 'training'}"
                    ".learning_rate or set training.clip_norm."
                )
            LOSS.set(entry["loss"], rank=str(self.worker.rank))
        if self.sparsifier is not None:
            entry["sparsity"] = self.sparsifier.overall_sparsity()
            SPARSITY.set(entry["sparsity"], rank=str(self.worker.rank))
        every = self.training.evaluate_every
        if last or (every is not None and self.step % every == 0):
            entry |= self._evaluate()
        self.history.append(entry)
        every = self.training.checkpoint_every
        if not last:
            saves = every is not None and self.step % every == 0
            self.worker.report(entry, self._write if saves else None)
            return self._trained()
        state = self._state()
        if self.sparsifier is not None:
            self.sparsifier.squash()
        trained = self._trained()

        def write(folder: Path) -> None:
            self._write(folder, state)
            if self.worker.rank == 0:
                save_trained(folder / MODEL_FILE, trained)

        self.worker.report(entry, write)
        return trained

    def _evaluate(self) -> dict[str, float]:
        return evaluate(bare(self.wrapped), self.task, self.worker)

    def _state(self) -> dict[str, Any]:
        return {
            "model": bare(self.wrapped).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": None if self.sparsifier is None else self.sparsifier.state_dict(),
            "step": self.step,
            "history": self.history,
            "world_size": self.worker.world_size,
        }

    def _write(self, folder: Path, state: dict[str, Any] | None = None) -> None:
        common = (state or self._state()) if self.worker.rank == 0 else None
        write_checkpoint(folder, self.worker.rank, common, {"carry": self.task.carry()})

    def _restore(self, folder: Path) -> None:
        common, own = read_checkpoint(folder, self.worker.rank, self.worker.device)
        bare(self.wrapped).load_state_dict(common["model"])
        self.optimizer.load_state_dict(common["optimizer"])
        if (self.sparsifier is None) != (common["sparsifier"] is None):
            raise UserError("The checkpoint to go on from is of a training, not of a pruning, or the other way round.")
        if self.sparsifier is not None:
            self.sparsifier.load_state_dict(common["sparsifier"])
        self.step, self.history = common["step"], list(common["history"])
        # With another number of workers the streams are others; they begin anew.
        if own is not None and common["world_size"] == self.worker.world_size:
            self.task.set_carry(own["carry"])
        if self.history and self.step >= self.steps:
            self.history.pop()  # the last report is made again

    def _trained(self) -> Trained:
        figures = {
            key: value for key, value in self.history[-1].items() if key not in ("step", "loss", "learning_rate")
        }
        return Trained(
            config=self.job.config,
            shape=self.task.shape,
            labels=self.task.labels,
            weights=bare(self.wrapped).state_dict(),
            steps=self.step,
            figures=figures,
            score=self.task.score,
            pattern=self.job.config.pruning.pattern if self.job.prune else None,
            sparsity=figures.get("sparsity", 0.0),
            history=tuple(self.history),
        )


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, worker: Worker) -> dict[str, float]:
    """The task's figures over all workers."""
    was_training = model.training
    model.eval()
    sums = task.evaluate(model)
    model.train(was_training)
    # Back-ends of GPUs reduce their own tensors only.
    return task.figures(worker.mean(sums.to(worker.device)).cpu() * worker.world_size)


def pattern_of(config: BalancedSparsityConfig) -> Pattern:
    """The configured pattern. Raises UserError for one that there is not."""
    try:
        return Pattern.parse(config.pruning.pattern)
    except ValueError as error:
        raise UserError(f"pruning.pattern: {error}") from error


def _sparsifier(config: BalancedSparsityConfig) -> Sparsifier:
    pruning, pattern = config.pruning, pattern_of(config)
    try:
        schedule = GradualSchedule(
            pruning.initial, pruning.sparsity, pruning.begin_step, pruning.begin_step + pruning.rise_steps,
            pruning.every, kind=pruning.kind,
        )  # fmt: skip
        return Sparsifier(pattern, schedule, skip=pruning.skip)
    except ValueError as error:
        raise UserError(f"pruning: {error}") from error


def _start(job: Job, task: Task) -> nn.Module:
    model = task.model()
    if job.start is None:
        if job.prune and job.config.model.name != "speaker_encoder":
            raise UserError("There is nothing to prune: name a trained model with --start (a run folder of `train`).")
        return model
    trained = load_trained(job.start)
    try:
        if trained.shape != task.shape:
            raise RuntimeError(f"its data is {trained.shape}, this is {task.shape}")
        model.load_state_dict(trained.weights)
    except RuntimeError as error:
        raise UserError(
            f"{job.start} is a {trained.config.model.name} for {trained.config.data.name} that does not fit the configuration: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    return model
