"""Masked loss of validation rows: the same rows and masks for every model, so that losses can be paired."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from apps.mcmisp.data.shards import PackedRows
from apps.mcmisp.masking import mask_rows
from apps.mcmisp.model.electra import Electra
from apps.mcmisp.model.encoder import HeadsByLayer
from apps.mcmisp.model.masked import MaskedLM
from apps.training.worker import Worker

RATE, SEED, AT_ONCE = 0.15, 77, 32


def word_predictor(model: nn.Module) -> MaskedLM:
    """The part that predicts words: BERT itself, or ELECTRA's generator."""
    found = model.generator if isinstance(model, Electra) else model
    if not isinstance(found, MaskedLM):
        raise TypeError(f"{type(model).__name__} predicts no words")
    return found


@torch.no_grad()
def masked_loss(
    model: nn.Module, rows: PackedRows, count: int, worker: Worker, ablated: HeadsByLayer | None = None
) -> dict[str, float]:
    """``validation_loss`` (nats a masked word) and ``validation_accuracy``; all words masked, none kept or replaced.

    The first ``count`` rows, spread over the workers; ``ablated`` heads contribute nothing.
    """
    was = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=worker.device)
    total = min(count, len(rows))
    for start in range(worker.rank * AT_ONCE, total, AT_ONCE * worker.world_size):
        stop = min(start + AT_ONCE, total)
        ids, document = (torch.from_numpy(part.astype("int64")).to(worker.device) for part in rows.read(start, stop))
        masked = mask_rows(
            ids, torch.arange(start, stop, device=worker.device), rate=RATE, seed=SEED, step=0,
            vocab_size=rows.manifest.vocab_size, random_share=0.0, keep_share=0.0,
        )  # fmt: skip
        logits, _ = word_predictor(model)(masked.ids_BS, document, masked.chosen_M, ablated=ablated)
        gold = ids.flatten()[masked.chosen_M]
        loss = functional.cross_entropy(logits.float(), gold, reduction="sum")
        sums += torch.stack(
            [loss.double(), (logits.argmax(-1) == gold).sum().double(), loss.new_tensor(len(gold)).double()]
        )
    model.train(was)
    loss_sum, right, predicted = worker.mean(sums).tolist()
    return {"validation_loss": loss_sum / predicted, "validation_accuracy": right / predicted}


__all__ = ["masked_loss", "word_predictor"]
