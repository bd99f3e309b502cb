"""The pre-training loop, with and without guidance, with and without Ray; resumed, it is bit for bit the unbroken one.

The state of a step: weights, optimizers, running mean, the schedule of guidance, difficulties, the course so far. The rows, the
masks and the learning rate follow from the step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.cluster.metrics import counter
from actors.cooccurrence import PairTable
from apps.mcmisp.config import McmispConfig
from apps.mcmisp.data.feed import Feed
from apps.mcmisp.data.shards import PackedRows
from apps.mcmisp.data.tokenizer import SPECIAL
from apps.mcmisp.evaluation.masked import masked_loss
from apps.mcmisp.guidance import Guide, WeightSchedule
from apps.mcmisp.masking import Difficulty, mask_rate, mask_rows
from apps.mcmisp.model import Electra, MaskedLM
from apps.mcmisp.training.objective import StepInput, StepLoss, electra_loss, masked_word_loss
from apps.mcmisp.training.optim import Optimizers, RunningMean, rate_factor
from apps.program.errors import UserError
from apps.training.checkpoint import read_checkpoint, save_tensors, write_checkpoint
from apps.training.position import mix
from apps.training.worker import Worker, bare

STEPS = counter("mcmisp", "trained", "steps", help="Optimizer steps done.", tags=["rank"])
TOKENS = counter("mcmisp", "trained", "tokens", help="Tokens trained on.", tags=["rank"])
MODEL_FILE = "model.pt"


@dataclass
class Pretrained:
    """What a training leaves: weights (the running mean where there is one), and its course."""

    config: McmispConfig
    model: nn.Module
    tokenizer_text: str
    history: list[dict[str, float]]
    step_s: float
    wait_fraction: float


def build_model(config: McmispConfig, vocab_size: int) -> nn.Module:
    """Weights that depend on ``training.seed`` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(mix(config.training.seed))
        if config.model.objective == "electra":
            return Electra(config.model, vocab_size)
        return MaskedLM(config.model.spec(vocab_size))


class Pretraining:
    """One worker's loop. ``run`` goes to the end from the worker's newest checkpoint, when there is one."""

    def __init__(self, config: McmispConfig, rows: PackedRows, feed: Feed, worker: Worker, table: PairTable | None):
        """``table`` is needed by the guided arms.

        Raises:
            UserError: the rows are longer than the model's positions, or a checkpoint is of another configuration or table.
        """
        self.config, self.training, self.worker, self.rows, self.feed = config, config.training, worker, rows, feed
        if rows.manifest.row_tokens > config.model.max_positions:
            raise UserError(
                f"data.row_tokens {rows.manifest.row_tokens} is more than model.max_positions {config.model.max_positions}."
            )
        if self.training.threads is not None and worker.device.type == "cpu":
            torch.set_num_threads(self.training.threads)
        self.vocab_size = rows.manifest.vocab_size
        self.model = build_model(config, self.vocab_size).to(worker.device)
        self.wrapped = worker.prepare(self.model)
        self.optimizers = Optimizers(self.model, self.training)
        self.mean = RunningMean(self.model.parameters(), self.training.ema) if self.training.ema else None
        self.guide = self._guide(table)
        self.schedule = WeightSchedule(config.guidance, self.training.steps)
        self.difficulty = Difficulty(self.vocab_size) if self.training.masking == "adaptive" else None
        self.identity = _identity(config, rows, table if config.is_guided else None)
        self.step, self.spent_s, self.began_at = 0, 0.0, 0
        self.history: list[dict[str, float]] = []
        self.validation = PackedRows(rows.folder, "validation")
        with worker.newest() as folder:
            if folder is not None:
                self._restore(folder)

    def run(self) -> Pretrained:
        """Trains to the end; the last report's checkpoint holds ``model.pt``, too."""
        recent: list[dict[str, float]] = []
        self.began_at = self.step
        while self.step < self.training.steps:
            began = time.perf_counter()
            outcome = self.one_step()
            self.step += 1
            self.spent_s += time.perf_counter() - began
            recent.append(outcome.figures)
            if self.step == self.training.steps or self._due():
                self._report(recent, last=self.step == self.training.steps)
                recent = []
        if self.mean is not None:
            self.mean.swap()
        done = max(1, self.training.steps - self.began_at)
        wait = self.feed.waited_s / self.spent_s if self.spent_s else 0.0
        return Pretrained(
            self.config, self.model, self.rows.tokenizer().text, self.history, self.spent_s / done, wait
        )  # fmt: skip

    def one_step(self) -> StepLoss:
        """Forward, backward, update; not counted in ``step``."""
        training, step = self.training, self.step
        batch = self.feed.batch(step).to(self.worker.device)
        masked = mask_rows(
            batch.ids_BS, batch.row_B, seed=training.seed, step=step, vocab_size=self.vocab_size, difficulty=self.difficulty,
            rate=mask_rate(step, training.steps, training.mask_rate_first, training.mask_rate_last),
        )  # fmt: skip
        weight = self.schedule.weight(step) if self.guide is not None else 0.0
        given = StepInput(batch, masked, step, training.seed, weight, training.z_loss)
        self.wrapped.train()
        with self._autocast():
            outcome = self._loss(given)
        outcome.loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), training.clip_norm or math.inf)
        if not torch.isfinite(norm):
            raise UserError(
                f"The gradient is not finite at step {step}: lower training.learning_rate or guidance.weight."
            )
        self.optimizers.step(rate_factor(training, step))
        if self.mean is not None:
            self.mean.update()
        self.schedule.observe(step, outcome.figures["error_rate"])
        outcome.figures["guidance_weight"] = weight
        if self.difficulty is not None:
            self._observe_difficulty(outcome)
        STEPS.increase(1, rank=str(self.worker.rank))
        TOKENS.increase(batch.ids_BS.numel(), rank=str(self.worker.rank))
        return outcome

    def evaluate(self) -> dict[str, float]:
        """Masked loss of the validation rows, with the running mean's weights."""
        with self.averaged(), self._autocast():
            return masked_loss(self.model, self.validation, self.training.evaluation_rows, self.worker)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The running mean's weights in the model."""
        if self.mean is not None:
            self.mean.swap()
        try:
            yield
        finally:
            if self.mean is not None:
                self.mean.swap()

    def _loss(self, given: StepInput) -> StepLoss:
        spec = self.config.model.spec(self.vocab_size)
        if self.config.model.objective == "electra":
            generator = self.config.model.generator_spec(self.vocab_size)
            shapes = {"generator": (generator.layers, generator.heads), "discriminator": (spec.layers, spec.heads)}
            return electra_loss(self.wrapped, given, self.guide, self.worker.mean, self.config.model, shapes)
        return masked_word_loss(self.wrapped, given, self.guide, self.worker.mean, (spec.layers, spec.heads))

    def _autocast(self) -> Any:
        enabled = self.training.precision == "bf16"
        return torch.autocast(self.worker.device.type, torch.bfloat16, enabled=enabled)

    def _guide(self, table: PairTable | None) -> Guide | None:
        if not self.config.is_guided:
            return None
        if table is None:
            raise UserError(f"The arm {self.config.arm} needs a co-occurrence table.")
        unigram = torch.from_numpy(table.marginals / max(1, table.marginals.sum()))
        return Guide(self.config.guidance, table, unigram, range(len(SPECIAL)))

    def _observe_difficulty(self, outcome: StepLoss) -> None:
        seen = torch.bincount(outcome.seen_M, minlength=self.vocab_size)
        wrong = torch.bincount(outcome.seen_M[outcome.wrong_M], minlength=self.vocab_size)
        both = self.worker.mean(torch.stack([seen, wrong]).double()) * self.worker.world_size
        if self.difficulty is not None:
            self.difficulty.observe(both[0], both[1])

    def _due(self) -> bool:
        counts = (self.training.report_every, self.training.evaluate_every, self.training.checkpoint_every)
        return any(count is not None and self.step % count == 0 for count in counts)

    def _report(self, recent: list[dict[str, float]], last: bool) -> None:
        keys = recent[-1].keys()
        entry: dict[str, Any] = {
            "step": self.step,
            "tokens": self.step * self.training.batch * self.rows.manifest.row_tokens,
        }
        entry |= {key: sum(one.get(key, 0.0) for one in recent) / len(recent) for key in keys}
        entry["seconds"] = self.spent_s
        every = self.training.evaluate_every
        if last or (every is not None and self.step % every == 0):
            entry |= self.evaluate()
        self.history.append(entry)
        every = self.training.checkpoint_every
        saves = last or (every is not None and self.step % every == 0)
        self.worker.report(entry, (lambda folder: self._write(folder, last)) if saves else None)

    def _write(self, folder: Path, last: bool) -> None:
        common = None
        if self.worker.rank == 0:
            common = {
                "identity": self.identity, "step": self.step, "model": bare(self.wrapped).state_dict(),
                "optimizers": self.optimizers.state_dict(), "mean": self.mean.state_dict() if self.mean else None,
                "schedule": self.schedule.state_dict(), "history": self.history, "spent_s": self.spent_s,
                "difficulty": self.difficulty.state_dict() if self.difficulty else None,
            }  # fmt: skip
        write_checkpoint(folder, self.worker.rank, common, {})
        if last and self.worker.rank == 0:
            with self.averaged():
                save_model(folder / MODEL_FILE, self.config, bare(self.wrapped), self.rows.tokenizer().text)

    def _restore(self, folder: Path) -> None:
        common, _ = read_checkpoint(folder, self.worker.rank, self.worker.device)
        theirs = common["identity"]
        differing = sorted(key for key in self.identity if self.identity[key] != theirs.get(key))
        if differing:
            raise UserError(
                f"The checkpoint in {folder} is of another {' and '.join(differing)}: go on with the same, or begin a new run."
            )
        bare(self.wrapped).load_state_dict(common["model"])
        self.optimizers.load_state_dict(common["optimizers"])
        if self.mean is not None:
            self.mean.load_state_dict(common["mean"])
        self.schedule.load_state_dict(common["schedule"])
        if self.difficulty is not None:
            self.difficulty.load_state_dict(common["difficulty"])
        self.step, self.history, self.spent_s = common["step"], list(common["history"]), common["spent_s"]


def _identity(config: McmispConfig, rows: PackedRows, table: PairTable | None) -> dict[str, str]:
    """What a checkpoint must have in common with the run that goes on from it."""

    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    free = {"workers", "threads", "report_every", "evaluate_every", "evaluation_rows", "checkpoint_every"}
    return {
        "model": digest(config.model.model_dump(mode="json")), "corpus": rows.manifest.fingerprint,
        "training": digest(config.training.model_dump(mode="json", exclude=free)),
        "guidance": digest([config.arm, config.guidance.model_dump(mode="json") if config.is_guided else None]),
        "table version": table.version if table is not None else "none",
    }  # fmt: skip


def save_model(path: Path, config: McmispConfig, model: nn.Module, tokenizer: str) -> None:
    """Weights with what is needed to use them."""
    save_tensors(path, {"config": config.model_dump_json(), "tokenizer": tokenizer, "weights": model.state_dict()})


__all__ = ["MODEL_FILE", "Pretrained", "Pretraining", "build_model", "save_model"]
