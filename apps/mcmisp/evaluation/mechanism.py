"""Does the mechanism do what it is meant to: where guided heads look at errors, which errors remain, what the heads are worth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from actors.cooccurrence import PairTable
from apps.mcmisp.data.shards import PackedRows
from apps.mcmisp.data.tokenizer import SPECIAL
from apps.mcmisp.evaluation.masked import AT_ONCE, RATE, SEED, masked_loss, word_predictor
from apps.mcmisp.guidance.choice import guided_heads
from apps.mcmisp.guidance.config import GuidanceConfig
from apps.mcmisp.masking import mask_rows
from apps.training.worker import LocalWorker
from kernels.guided_attention import Rows, kept_keys, log_weights_of_maps

COLLOCATION_NATS = 1.0
"""PMI of words that stand together e times as often as chance has it."""


@dataclass(frozen=True)
class Mechanism:
    """Over the validation rows. ``mass_*``: share of attention, over visible words, on the tenth of a row's words that

    go most with the wrong prediction. A collocation error: the wrong word goes with visible words (a score above
    ``COLLOCATION_NATS`` on average over that tenth); ``ablated_loss``: masked loss without the guided heads.
    """

    mass_guided_heads: float
    mass_other_heads: float
    error_rate: float
    collocation_error_rate: float
    other_error_rate: float
    loss: float
    ablated_loss: float


@torch.no_grad()
def mechanism(model: nn.Module, rows: PackedRows, table: PairTable, config: GuidanceConfig, count: int) -> Mechanism:
    """Measured with the masks of ``masked_loss``; ``model`` predicts words (ELECTRA: its generator)."""
    predictor = word_predictor(model).eval()
    spec = predictor.encoder.spec
    guided = guided_heads(config, spec.layers, spec.heads)
    every = {layer: tuple(range(spec.heads)) for layer in range(spec.layers)}
    sums = torch.zeros(6, dtype=torch.float64)
    for start in range(0, min(count, len(rows)), AT_ONCE):
        stop = min(start + AT_ONCE, count, len(rows))
        ids, document = (torch.from_numpy(part.astype("int64")) for part in rows.read(start, stop))
        masked = mask_rows(
            ids, torch.arange(start, stop), rate=RATE, seed=SEED, step=0, vocab_size=rows.manifest.vocab_size,
            random_share=0.0, keep_share=0.0,
        )  # fmt: skip
        logits, captures = predictor(masked.ids_BS, document, masked.chosen_M, guided=every, backend="maps")
        predicted, gold = logits.argmax(-1), ids.flatten()[masked.chosen_M]
        wrong = predicted != gold
        wanted = torch.zeros(ids.numel(), dtype=torch.bool)
        wanted[masked.chosen_M[wrong]] = True
        errors = Rows.at(wanted.view_as(ids))
        kept = kept_keys(errors, (ids >= len(SPECIAL)) & ~masked.chosen_BS, document)
        scores = table.scores(predicted[wrong], ids[errors.sequence_E])
        top = _top_tenth(scores, kept)
        usable = kept.any(1)
        strong = (torch.where(top, scores, 0.0).sum(1) / top.sum(1).clamp(min=1)) > COLLOCATION_NATS
        collocation = strong & usable
        for captured in captures:
            if captured.scores_BGSS is None:
                continue
            weights = log_weights_of_maps(captured.scores_BGSS, errors, kept).exp()
            mass = torch.where(top[:, None], weights, 0.0).sum(-1)[usable].double()  # [E, H]
            mine = list(guided.get(captured.layer, ()))
            others = [h for h in range(spec.heads) if h not in mine]
            sums[:4] += torch.tensor([f(mass[:, h]) for h in (mine, others) for f in (torch.sum, torch.numel)]).double()
        sums += torch.tensor([0, 0, 0, 0, float(collocation.sum()), float(len(gold))]).double()
    guided_mass, guided_count, other_mass, other_count, collocations, predictions = sums.tolist()
    plain = masked_loss(predictor, rows, count, LocalWorker())
    without = masked_loss(predictor, rows, count, LocalWorker(), ablated=guided)
    error_rate = 1 - plain["validation_accuracy"]
    return Mechanism(
        mass_guided_heads=guided_mass / max(1.0, guided_count), mass_other_heads=other_mass / max(1.0, other_count),
        error_rate=error_rate, collocation_error_rate=collocations / predictions,
        other_error_rate=error_rate - collocations / predictions, loss=plain["validation_loss"],
        ablated_loss=without["validation_loss"],
    )  # fmt: skip


def _top_tenth(scores_ES: torch.Tensor, kept_ES: torch.Tensor) -> torch.Tensor:
    """True at the tenth (at least one) of a row's kept keys with the highest scores."""
    count = (kept_ES.sum(1) / 10).ceil().long()
    rank = scores_ES.masked_fill(~kept_ES, float("-inf")).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < count[:, None]) & kept_ES


__all__ = ["Mechanism", "mechanism"]
