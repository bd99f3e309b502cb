"""What a training step and a score are for each workload; a task holds its data, and is asked for the loss of a step.

A step's batch depends on (seed, step) alone. What a task carries from step to step (a language model's state) is in ``carry``.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from apps.balanced_sparsity.config import BalancedSparsityConfig
from apps.balanced_sparsity.data import speech
from apps.balanced_sparsity.data.images import shift_and_mirror
from apps.balanced_sparsity.data.load import load_data
from apps.balanced_sparsity.models.build import Shape, build_model
from apps.balanced_sparsity.models.speaker_encoder import trained_speaker_encoder, voice_of
from apps.program.errors import UserError
from apps.training.position import batch_indices, mix, place_of, share_of, steps_per_epoch
from apps.training.worker import LocalWorker, Worker

EVALUATION_BATCH = 500


class Task(Protocol):
    """A workload on one worker."""

    score: str
    """Key of the headline figure in ``figures``."""
    higher_is_better: bool
    epoch_steps: int
    shape: Shape
    labels: tuple[str, ...]
    """Names of the outputs: classes, words, speakers."""

    def model(self) -> nn.Module:
        """A fresh network (the speaker encoder: with its published weights)."""
        ...

    def loss(self, model: nn.Module, step: int) -> torch.Tensor:
        """Of this worker's share of the step's batch."""
        ...

    def evaluate(self, model: nn.Module) -> torch.Tensor:
        """Sums over this worker's share of what is held out, float64 [3]: (count, losses, right answers)."""
        ...

    def figures(self, sums: torch.Tensor) -> dict[str, float]:
        """From the sums over all workers."""
        ...

    def carry(self) -> Any:
        """What a later step needs of the earlier ones, as tensors."""
        ...

    def set_carry(self, carry: Any) -> None: ...


class _Classification:
    """What image and sequence classification share."""

    score, higher_is_better = "accuracy", True

    def figures(self, sums: torch.Tensor) -> dict[str, float]:
        count, losses, right = (float(value) for value in sums)
        return {"accuracy": right / count, "test_loss": losses / count, "examples": count}

    def carry(self) -> Any:
        return None

    def set_carry(self, carry: Any) -> None:
        """There is none."""

    @staticmethod
    def _sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(logits, labels, reduction="sum")
        return torch.stack([torch.tensor(len(labels)), losses.cpu(), (logits.argmax(1) == labels).sum().cpu()]).double()


class ImageTask(_Classification):
    """Images in memory: digits, CIFAR-10."""

    def __init__(self, config: BalancedSparsityConfig, worker: Worker):
        self.data: Any = load_data(config.data)
        self.train = self.data.train.first(config.data.limit)
        self.config, self.worker = config, worker
        self.epoch_steps = _steps_per_epoch(len(self.train), config.training.batch)
        channels, height, width = self.data.shape
        self.shape = Shape(channels, len(self.data.classes), min(height, width))
        self.labels = self.data.classes

    def model(self) -> nn.Module:
        return build_model(self.config.model, self.shape)

    def loss(self, model: nn.Module, step: int) -> torch.Tensor:
        training, worker = self.config.training, self.worker
        mine = batch_indices(step, len(self.train), training.batch, training.seed, worker.rank, worker.world_size)
        pixels, labels = self.train.pixels[mine], self.train.labels[mine]
        if self.config.data.shift:
            generator = torch.Generator().manual_seed(mix(training.seed, step, worker.rank, 1))
            pixels = shift_and_mirror(pixels, self.config.data.shift, generator)
        inputs = self.data.normalised(pixels).to(worker.device)
        return F.cross_entropy(model(inputs), labels.to(worker.device))

    def evaluate(self, model: nn.Module) -> torch.Tensor:
        test, worker = self.data.test, self.worker
        sums = torch.zeros(3, dtype=torch.float64)
        for mine in torch.arange(worker.rank, len(test), worker.world_size).split(EVALUATION_BATCH):
            inputs = self.data.normalised(test.pixels[mine]).to(worker.device)
            sums += self._sums(model(inputs), test.labels[mine].to(worker.device))
        return sums


class ImageFolderTask(_Classification):
    """ImageNet-style folders."""

    def __init__(self, config: BalancedSparsityConfig, worker: Worker):
        self.data: Any = load_data(config.data)
        self.examples = min(len(self.data.train), config.data.limit or len(self.data.train))
        self.config, self.worker = config, worker
        self.epoch_steps = _steps_per_epoch(self.examples, config.training.batch)
        self.shape = Shape(3, len(self.data.classes), config.data.size)
        self.labels = self.data.classes

    def model(self) -> nn.Module:
        return build_model(self.config.model, self.shape)

    def loss(self, model: nn.Module, step: int) -> torch.Tensor:
        training, worker = self.config.training, self.worker
        # Files come class by class: a limited set must hold all classes.
        chosen = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(0))[: self.examples]
        mine = batch_indices(step, self.examples, training.batch, training.seed, worker.rank, worker.world_size)
        epoch = place_of(step, self.examples, training.batch).epoch
        inputs, labels = self.data.training_batch(chosen[mine], training.seed, epoch)
        return F.cross_entropy(model(inputs.to(worker.device)), labels.to(worker.device))

    def evaluate(self, model: nn.Module) -> torch.Tensor:
        sums, batch = torch.zeros(3, dtype=torch.float64), 32
        for first in range(self.worker.rank * batch, len(self.data.test), self.worker.world_size * batch):
            inputs, labels = self.data.test_batch(first, min(first + batch, len(self.data.test)))
            sums += self._sums(model(inputs.to(self.worker.device)), labels.to(self.worker.device))
        return sums


class SequenceTask(_Classification):
    """Sequences of frames: digits row by row, spoken digits, phones."""

    def __init__(self, config: BalancedSparsityConfig, worker: Worker):
        self.data: Any = load_data(config.data)
        self.examples = min(len(self.data.train), config.data.limit or len(self.data.train))
        self.config, self.worker = config, worker
        self.epoch_steps = _steps_per_epoch(self.examples, config.training.batch)
        self.shape = Shape(int(self.data.train.frames.shape[2]), len(self.data.classes))
        self.labels = self.data.classes

    def model(self) -> nn.Module:
        return build_model(self.config.model, self.shape)

    def loss(self, model: nn.Module, step: int) -> torch.Tensor:
        training, worker = self.config.training, self.worker
        mine = batch_indices(step, self.examples, training.batch, training.seed, worker.rank, worker.world_size)
        logits, labels = self._answer(model, self.data.train, mine)
        return F.cross_entropy(logits, labels)

    def evaluate(self, model: nn.Module) -> torch.Tensor:
        test = self.data.test
        sums = torch.zeros(3, dtype=torch.float64)
        for mine in torch.arange(self.worker.rank, len(test), self.worker.world_size).split(EVALUATION_BATCH):
            sums += self._sums(*self._answer(model, test, mine))
        return sums

    def _answer(
        self, model: nn.Module, part: speech.Sequences, mine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = part.lengths[mine]
        frames = part.frames[mine, : int(lengths.max())].to(self.worker.device)
        return model(frames, lengths.to(self.worker.device)), part.labels[mine].to(self.worker.device)


class LanguageTask:
    """Word-level language modelling: ``batch`` streams of text, the state carried along each of them."""

    score, higher_is_better = "perplexity", False
    EVALUATION_STREAMS = 20

    def __init__(self, config: BalancedSparsityConfig, worker: Worker):
        self.data: Any = load_data(config.data)
        self.config, self.worker = config, worker
        batch = config.training.batch
        self.share = share_of(batch, worker.world_size)
        length = len(self.data.train) // batch
        if length < 2:
            raise UserError(f"{len(self.data.train)} tokens are too few for {batch} streams: lower training.batch.")
        self.streams_TB = self.data.train[: length * batch].view(batch, length).T.contiguous()
        self.epoch_steps = -(-(length - 1) // config.data.sequence)
        self.shape = Shape(0, len(self.data.words))
        self.labels = self.data.words
        self._state: tuple[torch.Tensor, torch.Tensor] | None = None

    def model(self) -> nn.Module:
        return build_model(self.config.model, self.shape)

    def loss(self, model: nn.Module, step: int) -> torch.Tensor:
        place = step % self.epoch_steps
        first = place * self.config.data.sequence
        last = min(first + self.config.data.sequence, len(self.streams_TB) - 1)
        columns = slice(self.worker.rank * self.share, (self.worker.rank + 1) * self.share)
        words, following = (
            self.streams_TB[first + shift : last + shift, columns].to(self.worker.device) for shift in (0, 1)
        )
        state = self._state if place and self._state is not None else _first_state(self.config, self.share, self.worker)
        logits, state = model(words, state)
        self._state = (state[0].detach(), state[1].detach())
        return F.cross_entropy(logits.flatten(0, 1), following.flatten())

    def evaluate(self, model: nn.Module) -> torch.Tensor:
        """Words of the held-out text in ``EVALUATION_STREAMS`` streams, each read from its beginning with a state of zeros."""
        test, worker = self.data.test, self.worker
        streams = max(1, min(self.EVALUATION_STREAMS, len(test) // 50))
        length = len(test) // streams
        columns = test[: length * streams].view(streams, length).T[:, worker.rank :: worker.world_size]
        sums = torch.zeros(3, dtype=torch.float64)
        if columns.shape[1] == 0:
            return sums
        state = _first_state(self.config, columns.shape[1], worker)
        for first in range(0, length - 1, 70):
            last = min(first + 70, length - 1)
            words, following = (columns[first + shift : last + shift].to(worker.device) for shift in (0, 1))
            logits, state = model(words, state)
            flat, wanted = logits.flatten(0, 1), following.flatten()
            losses = F.cross_entropy(flat, wanted, reduction="sum").cpu()
            sums += torch.stack([torch.tensor(wanted.numel()), losses, (flat.argmax(1) == wanted).sum().cpu()]).double()
        return sums

    def figures(self, sums: torch.Tensor) -> dict[str, float]:
        count, losses, right = (float(value) for value in sums)
        # exp overflows for a model that has gone astray; that is infinitely bad, not an error.
        perplexity = math.exp(losses / count) if losses / count < 700 else math.inf
        return {"perplexity": perplexity, "accuracy": right / count, "test_loss": losses / count, "examples": count}

    def carry(self) -> Any:
        return None if self._state is None else list(self._state)

    def set_carry(self, carry: Any) -> None:
        self._state = None if carry is None else (carry[0].to(self.worker.device), carry[1].to(self.worker.device))


class SpeakerTask:
    """The trained speaker encoder: while it is pruned it learns to hear what it heard when dense, from speech without labels.

    Score: share of the held-out sentences whose voice is nearest (cosine) to the reference of the right speaker, which is the
    mean over the sentences enrolled, all embedded by the same network.
    """

    score, higher_is_better = "accuracy", True
    figures = _Classification.figures
    carry, set_carry = _Classification.carry, _Classification.set_carry

    def __init__(self, config: BalancedSparsityConfig, worker: Worker):
        data = config.data
        self.data: Any = load_data(data)
        self.config, self.worker = config, worker
        self.teacher = trained_speaker_encoder(config.model.weights).to(worker.device).eval()
        # One piece after the other, so that a window is a slice at any of its piece's frames; drawn from the voices to be told
        # apart and from the other speech in equal parts.
        known = len(self.data.enrolled)
        parts = [part for part in (self.data.recovery[:known], self.data.recovery[known:]) if part]
        self.frames = torch.cat([one for part in parts for one in part])
        self.starts = _window_starts(parts, data.sequence)
        self.teacher.rescale_(self.frames.std(dim=0).clamp(min=1e-8).to(worker.device))
        windows = max(config.training.batch, len(self.frames) // data.sequence)
        self.epoch_steps = _steps_per_epoch(windows, config.training.batch)
        self.shape = Shape(40, 256)
        self.labels = self.data.speakers

    def model(self) -> nn.Module:
        return copy.deepcopy(self.teacher).train()

    def loss(self, model: nn.Module, step: int) -> torch.Tensor:
        training, worker = self.config.training, self.worker
        generator = torch.Generator().manual_seed(mix(training.seed, step))
        share = share_of(training.batch, worker.world_size)
        drawn = torch.cat([
            starts[torch.randint(len(starts), (-(-training.batch // len(self.starts)),), generator=generator)]
            for starts in self.starts
        ])[torch.randperm(training.batch, generator=generator)]  # fmt: skip
        gains = 10 ** ((torch.rand(training.batch, generator=generator) - 0.5) / 2)  # -5 to +5 dB of power
        mine = slice(worker.rank * share, (worker.rank + 1) * share)
        places = drawn[mine][:, None] + torch.arange(self.config.data.sequence)
        inputs = (self.frames[places] * gains[mine, None, None]).to(worker.device)
        with torch.no_grad():
            wanted, voice = self.teacher(inputs)
        heard, mine_voice = model(inputs)
        # All layers' outputs at all frames tell the network far more than the voices alone.
        losses = [F.mse_loss(ours, dense) / dense.var() for ours, dense in zip(heard, wanted, strict=True)]
        return torch.stack(losses).mean() + (1 - (voice * mine_voice).sum(1)).mean()

    def evaluate(self, model: nn.Module) -> torch.Tensor:
        known = torch.tensor([speaker for speaker, _ in self.data.enrolled])
        voices = voice_of(model, [one for _, one in self.data.enrolled]).cpu()
        references = torch.stack(
            [F.normalize(voices[known == number].mean(0), dim=0) for number in range(len(self.data.speakers))]
        )
        mine = self.data.held_out[self.worker.rank :: self.worker.world_size]
        if not mine:
            return torch.zeros(3, dtype=torch.float64)
        similarity = voice_of(model, [one for _, one in mine]).cpu() @ references.T
        truth = torch.tensor([speaker for speaker, _ in mine])
        right = (similarity.argmax(1) == truth).sum()
        # As a loss: how far the right speaker is from similarity 1.
        losses = (1 - similarity[torch.arange(len(truth)), truth]).sum()
        return torch.stack([torch.tensor(len(truth)), losses, right]).double()


def make_task(config: BalancedSparsityConfig, worker: Worker | None = None) -> Task:
    """The configuration's task on ``worker`` (default: this process).

    Raises:
        UserError: data or weights are missing, or too small for the batch.
    """
    worker = worker or LocalWorker()
    if config.model.name == "vgg":
        return ImageFolderTask(config, worker) if config.data.name == "image_folder" else ImageTask(config, worker)
    if config.model.name == "speech_lstm":
        return SequenceTask(config, worker)
    return LanguageTask(config, worker) if config.model.name == "word_lstm" else SpeakerTask(config, worker)


def _first_state(config: BalancedSparsityConfig, streams: int, worker: Worker) -> tuple[torch.Tensor, torch.Tensor]:
    lstm = config.model.lstm
    zeros = torch.zeros(lstm.layers, streams, lstm.hidden, device=worker.device)
    return zeros, zeros.clone()


def _steps_per_epoch(examples: int, batch: int) -> int:
    try:
        return steps_per_epoch(examples, batch)
    except ValueError as error:
        raise UserError(f"training.batch is too large: {error}.") from error


def _window_starts(parts: list[tuple[torch.Tensor, ...]], length: int) -> list[torch.Tensor]:
    """Of each part, where windows of ``length`` frames may begin when all pieces [frames, channels] lie one after the other."""
    starts, offset = [], 0
    for part in parts:
        found = []
        for one in part:
            found.append(torch.arange(max(0, len(one) - length + 1)) + offset)
            offset += len(one)
        starts.append(torch.cat(found))
        if not len(starts[-1]):
            raise UserError(f"No recording is as long as data.sequence={length} frames: make it smaller.")
    return starts
