"""One step's loss: masked words, ELECTRA's detection, z-loss and guidance, each averaged over what all workers hold together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from apps.mcmisp.data.feed import Batch
from apps.mcmisp.data.tokenizer import PAD
from apps.mcmisp.guidance import Errors, Guide
from apps.mcmisp.masking import Masked, uniform
from apps.mcmisp.model.config import ModelConfig
from apps.mcmisp.model.electra import ElectraOutput
from kernels.guided_attention import Rows

Mean = Callable[[torch.Tensor], torch.Tensor]
"""Mean over the workers of a vector of numbers."""


@dataclass(frozen=True)
class StepInput:
    """Everything that the loss of a step follows from. ``weight``: of guidance, 0 leaves it out."""

    batch: Batch
    masked: Masked
    step: int
    seed: int
    weight: float
    z_loss: float


@dataclass
class StepLoss:
    """``loss``: this worker's, such that the mean of all workers' gradients is the gradient of the global mean.

    ``figures``: global means. ``wrong_M``: mis-predicted among the masked, for adaptive masking.
    """

    loss: torch.Tensor
    figures: dict[str, float]
    wrong_M: torch.Tensor
    seen_M: torch.Tensor
    extra: dict[str, Any] = field(default_factory=dict)


def masked_word_loss(
    model: nn.Module, given: StepInput, guide: Guide | None, mean: Mean, shape: tuple[int, int]
) -> StepLoss:
    """BERT. ``shape``: layers and heads of the encoder."""
    batch, masked = given.batch, given.masked
    capture: dict[str, Any] = {}
    if guide is not None and given.weight > 0:
        capture = {
            "guided": guide.heads(*shape), "backend": guide.backend(batch.ids_BS.shape[1], batch.ids_BS.device)
        }  # fmt: skip
    logits, captures = model(masked.ids_BS, batch.document_BS, masked.chosen_M, **capture)
    words = _Words.of(logits, batch.ids_BS.flatten()[masked.chosen_M])
    total = torch.zeros((), device=logits.device)
    gated = torch.zeros((), device=logits.device)
    if guide is not None and captures:
        errors = _errors_at(guide, given, words.wrong & guide.gate(words.predicted, words.probability), words.predicted)
        result = guide.loss(captures, errors, batch.document_BS, batch.ids_BS)
        total, gated = result.total, torch.tensor(float(result.errors), device=logits.device)
    count = torch.tensor(float(len(masked.chosen_M)), device=logits.device)
    local = torch.stack([words.nll.sum(), words.square.sum(), total, count, words.wrong.sum().float(), gated])
    nll, square, guided, masks, wrong, errors_count = mean(local.detach()).unbind()
    loss = words.nll.sum() / masks + given.z_loss * words.square.sum() / masks
    if captures:
        # Divided by the errors of all workers: the result does not depend on how they are spread.
        loss = loss + given.weight * total / errors_count.clamp(min=1e-9)
    figures = {"loss": float(nll / masks), "z": float(square / masks), "error_rate": float(wrong / masks)}
    figures |= {"guided_share": float(errors_count / masks)}
    if captures:
        figures["divergence"] = float(guided / errors_count.clamp(min=1e-9))
    return StepLoss(loss, figures, words.wrong, words.gold)


def electra_loss(
    model: nn.Module,
    given: StepInput,
    guide: Guide | None,
    mean: Mean,
    config: ModelConfig,
    shapes: dict[str, tuple[int, int]],
) -> StepLoss:
    """ELECTRA; a mis-prediction is the generator's argmax (``generator``) or a sampled word that is not the original one."""
    batch, masked = given.batch, given.masked
    where = guide.config.electra if guide is not None and given.weight > 0 else None
    capture: dict[str, Any] = {}
    if guide is not None and where is not None:
        capture["backend"] = guide.backend(batch.ids_BS.shape[1], batch.ids_BS.device)
        if where in ("generator", "both"):
            capture["generator_guided"] = guide.heads(*shapes["generator"])
        if where in ("discriminator", "both"):
            capture["guided"] = guide.heads(*shapes["discriminator"])
    draws = _draws(given, stream=4)
    out: ElectraOutput = model(masked.ids_BS, batch.ids_BS, batch.document_BS, masked.chosen_M, draws, **capture)
    words = _Words.of(out.generator_logits_MV, batch.ids_BS.flatten()[masked.chosen_M])
    real = batch.ids_BS != PAD
    detection = functional.binary_cross_entropy_with_logits(
        out.detection_BS.float(), out.replaced_BS.float(), reduction="none"
    )
    detected = torch.where(real, detection, 0.0).sum()
    total = torch.zeros((), device=detection.device)
    errors_count = torch.zeros((), device=detection.device)
    if guide is not None:
        if out.generator_captures:
            wrong = words.wrong & guide.gate(words.predicted, words.probability)
            result = guide.loss(
                out.generator_captures,
                _errors_at(guide, given, wrong, words.predicted),
                batch.document_BS,
                batch.ids_BS,
            )
            total, errors_count = total + result.total, errors_count + result.errors
        if out.discriminator_captures:
            wrong = out.replaced_BS.flatten()[masked.chosen_M]
            if guide.config.undetected_only:
                wrong = wrong & (out.detection_BS.flatten()[masked.chosen_M] < 0)
            result = guide.loss(
                out.discriminator_captures,
                _errors_at(guide, given, wrong, out.sampled_M),
                batch.document_BS,
                batch.ids_BS,
            )
            total, errors_count = total + result.total, errors_count + result.errors
    right = ((out.detection_BS > 0) == out.replaced_BS) & real
    local = torch.stack(
        [words.nll.sum(), words.square.sum(), detected, total, *(torch.tensor(float(n)) .to(total) for n in (
            len(masked.chosen_M), int(real.sum()), int(words.wrong.sum()), int(right.sum()), int(out.replaced_BS.sum())
        )), errors_count]
    )  # fmt: skip
    nll, square, found, guided, masks, tokens, wrong_words, rights, replaced, errors_all = mean(local.detach()).unbind()
    loss = words.nll.sum() / masks + given.z_loss * words.square.sum() / masks
    loss = loss + config.discriminator_weight * detected / tokens
    if out.generator_captures or out.discriminator_captures:
        loss = loss + given.weight * total / errors_all.clamp(min=1e-9)
    figures = {
        "loss": float(nll / masks), "z": float(square / masks), "error_rate": float(wrong_words / masks),
        "detection_loss": float(found / tokens), "detection_accuracy": float(rights / tokens),
        "replaced_share": float(replaced / masks), "guided_share": float(errors_all / masks),
        "divergence": float(guided / errors_all.clamp(min=1e-9)),
    }  # fmt: skip
    return StepLoss(loss, figures, words.wrong, words.gold)


@dataclass(frozen=True)
class _Words:
    """Of each masked word [M]: negative log-likelihood, squared log-denominator, the prediction, its probability."""

    nll: torch.Tensor
    square: torch.Tensor
    predicted: torch.Tensor
    probability: torch.Tensor
    wrong: torch.Tensor
    gold: torch.Tensor

    @classmethod
    def of(cls, logits_MV: torch.Tensor, gold_M: torch.Tensor) -> _Words:
        logits = logits_MV.float()
        lse = logits.logsumexp(-1)
        with torch.no_grad():
            top, predicted = logits.max(-1)
            probability = (top - lse).exp()
        nll = lse - logits.gather(1, gold_M[:, None]).squeeze(1)
        return cls(nll, lse.square(), predicted, probability, predicted != gold_M, gold_M)


def _draws(given: StepInput, stream: int) -> torch.Tensor:
    batch = given.batch
    return uniform(given.seed, given.step, batch.row_B, batch.ids_BS.shape[1], stream).flatten()[given.masked.chosen_M]


def _errors_at(guide: Guide, given: StepInput, wrong_M: torch.Tensor, words_M: torch.Tensor) -> Errors:
    """The errors among the masked positions, in the order of their places."""
    batch, masked = given.batch, given.masked
    wanted = torch.zeros_like(masked.chosen_BS).flatten()
    wanted[masked.chosen_M[wrong_M]] = True
    right = batch.ids_BS.flatten()[masked.chosen_M]
    return Errors(
        rows=Rows.at(wanted.view_as(masked.chosen_BS)), wrong_E=words_M[wrong_M], right_E=right[wrong_M],
        draws_E=_draws(given, stream=3)[wrong_M], kept_BS=guide.kept(batch.ids_BS, masked.chosen_BS),
    )  # fmt: skip


__all__ = ["StepInput", "StepLoss", "electra_loss", "masked_word_loss"]
