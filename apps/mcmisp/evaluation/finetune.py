"""Fine-tuning an encoder on a classification task: a linear layer on [CLS], all weights trained (Devlin et al. 2019)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from apps.mcmisp.config import EvaluationConfig
from apps.mcmisp.data.tokenizer import CLS, PAD, SEP, TextTokenizer
from apps.mcmisp.evaluation.tasks import Example, TextTask
from apps.mcmisp.model.electra import Electra
from apps.mcmisp.model.encoder import Encoder
from apps.mcmisp.model.masked import MaskedLM
from apps.training.position import mix


@dataclass(frozen=True)
class FineTuned:
    """``accuracy`` on the test examples; ``majority``: of always saying the more frequent label there."""

    task: str
    accuracy: float
    majority: float
    losses: list[float]


class Classifier(nn.Module):
    def __init__(self, encoder: Encoder, labels: int):
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(0.1)
        self.out = nn.Linear(encoder.spec.width, labels)
        nn.init.normal_(self.out.weight, std=0.02)

    def forward(self, ids_BS: torch.Tensor, document_BS: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.encoder(ids_BS, document_BS)
        return self.out(self.dropout(hidden[:, 0]))


def finetune(
    model: nn.Module,
    tokenizer: TextTokenizer,
    task: TextTask,
    config: EvaluationConfig,
    seed: int,
    told: Callable[[int, int], None] | None = None,
) -> FineTuned:
    """Trains a copy of the encoder (ELECTRA: the discriminator); the same seed gives the same result."""
    with torch.random.fork_rng():
        torch.manual_seed(mix(seed, 5))
        classifier = Classifier(copy.deepcopy(encoder_of(model)), task.labels)
        train = _encode(task.train[: config.examples], tokenizer, classifier.encoder.spec.max_positions)
        steps = config.epochs * max(1, len(train) // config.batch)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=config.learning_rate, weight_decay=0.01)
        classifier.train()
        losses: list[float] = []
        done = 0
        for epoch in range(config.epochs):
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(mix(seed, epoch))).tolist()
            for start in range(0, max(1, len(train) // config.batch) * config.batch, config.batch):
                ids, document, labels = _collate([train[i] for i in order[start : start + config.batch]])
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * min(1.0, (done + 1) / (0.1 * steps + 1)) * (1 - done / steps)
                loss = functional.cross_entropy(classifier(ids, document), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
                optimizer.step()
                losses.append(float(loss.detach()))
                done += 1
                if told is not None:
                    told(done, steps)
        right = _right(classifier, _encode(task.test, tokenizer, classifier.encoder.spec.max_positions))
    share = sum(example.label for example in task.test) / len(task.test)
    return FineTuned(task.name, right / len(task.test), max(share, 1 - share), losses)


def encoder_of(model: nn.Module) -> Encoder:
    """What is kept for downstream use."""
    if isinstance(model, Electra):
        return model.discriminator
    if isinstance(model, MaskedLM):
        return model.encoder
    raise TypeError(f"{type(model).__name__} has no encoder")


@torch.no_grad()
def _right(classifier: Classifier, examples: list[tuple[list[int], int]]) -> int:
    classifier.eval()
    right = 0
    for start in range(0, len(examples), 64):
        ids, document, labels = _collate(examples[start : start + 64])
        right += int((classifier(ids, document).argmax(-1) == labels).sum())
    return right


def _encode(examples: list[Example], tokenizer: TextTokenizer, limit: int) -> list[tuple[list[int], int]]:
    first = tokenizer.encode([example.first for example in examples])
    second = tokenizer.encode([example.second or "" for example in examples])
    encoded = []
    for example, a, b in zip(examples, first, second, strict=True):
        if example.second is None:
            ids = [CLS, *a[: limit - 2], SEP]
        else:
            b = b[: limit // 2]
            ids = [CLS, *a[: limit - 3 - len(b)], SEP, *b, SEP]  # the longer text, not the hypothesis, is cut
        encoded.append((ids, example.label))
    return encoded


def _collate(examples: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = max(len(ids) for ids, _ in examples)
    ids = torch.full((len(examples), size), PAD)
    for row, (text, _) in enumerate(examples):
        ids[row, : len(text)] = torch.tensor(text)
    return ids, (ids != PAD).long(), torch.tensor([label for _, label in examples])


__all__ = ["FineTuned", "encoder_of", "finetune"]
