"""Training steps that are timed against each other: ours plain and guided, and transformers' BERT on the same rows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch

from actors.cooccurrence import PairTable
from apps.mcmisp.config import Arm, McmispConfig
from apps.mcmisp.data.feed import local_feed
from apps.mcmisp.data.order import RowOrder
from apps.mcmisp.data.shards import PackedRows
from apps.mcmisp.masking import mask_rows
from apps.mcmisp.model import MaskedLM
from apps.mcmisp.training.loop import Pretraining
from apps.training.worker import LocalWorker


def loop_of(config: McmispConfig, arm: Arm, rows: PackedRows, table: PairTable | None) -> Pretraining:
    """A loop that steps for ever, with guidance at work from its first step on every error: its highest price."""
    one = config.for_arm(arm)
    guidance = {"gate": "all", "start_error_rate": 1.0, "schedule": "constant"}
    one = one.model_copy(update={"guidance": one.guidance.model_copy(update=guidance)})
    order = RowOrder(len(rows), one.training.batch, one.data.window_rows, 0)
    return Pretraining(one, rows, local_feed(rows, order), LocalWorker(), table if one.is_guided else None)


def timed_step(loop: Pretraining, cpu: bool) -> Callable[[], float]:
    """Seconds of the loop's next step: of the processor or of the wall clock."""
    clock = time.process_time if cpu else time.perf_counter

    def step() -> float:
        began = clock()
        loop.one_step()
        loop.step += 1
        return clock() - began

    return step


def encoder_arms(rows: PackedRows, size: str, batch: int, family: str = "modern") -> dict[str, Callable[[], float]]:
    """Seconds of a step (masks of 15 %, forward, backward, AdamW, bfloat16) of ours and of transformers' BERT of that size.

    Ours has documents masked from each other, theirs sees whole rows; both get the same ids and labels.
    """
    from transformers import BertConfig, BertForMaskedLM

    from apps.mcmisp.model.config import ModelConfig

    vocab, length = rows.manifest.vocab_size, rows.manifest.row_tokens
    model_config = ModelConfig.model_validate({"size": size, "family": family, "max_positions": length})
    spec = model_config.spec(vocab)
    torch.manual_seed(0)
    ours = MaskedLM(spec)
    theirs = BertForMaskedLM(
        BertConfig(
            vocab_size=vocab, hidden_size=spec.width, num_hidden_layers=spec.layers, num_attention_heads=spec.heads,
            intermediate_size=4 * spec.width, max_position_embeddings=length, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, attn_implementation="sdpa",  # type: ignore[call-arg]
        )
    )  # fmt: skip
    theirs.train()
    optimizers = {
        name: torch.optim.AdamW(m.parameters(), lr=1e-4) for name, m in {"ours": ours, "theirs": theirs}.items()
    }
    counters = {"ours": itertools.count(), "theirs": itertools.count()}

    def data(name: str):
        number = next(counters[name])
        start = number * batch % (len(rows) - batch)
        ids, document = (torch.from_numpy(part.astype("int64")) for part in rows.read(start, start + batch))
        masked = mask_rows(ids, torch.arange(start, start + batch), rate=0.15, seed=0, step=number, vocab_size=vocab)
        return ids, document, masked

    def our_step() -> float:
        ids, document, masked = data("ours")
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = ours(masked.ids_BS, document, masked.chosen_M)
            loss = torch.nn.functional.cross_entropy(logits.float(), ids.flatten()[masked.chosen_M])
        return _finish("ours", loss, began)

    def their_step() -> float:
        ids, _, masked = data("theirs")
        labels = torch.where(masked.chosen_BS, ids, -100)
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = theirs(masked.ids_BS, labels=labels).loss
        return _finish("theirs", loss, began)

    def _finish(name: str, loss: torch.Tensor, began: float) -> float:
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)
        return time.perf_counter() - began

    return {"ours": our_step, "theirs": their_step}


def parameters(size: str, vocab: int) -> tuple[int, int]:
    """Weights of ours (modern) and of the classic encoder of that size."""
    from apps.mcmisp.model.config import ModelConfig

    specs = (
        ModelConfig.model_validate({"size": size, "family": family}).spec(vocab) for family in ("modern", "classic")
    )
    modern, classic = (sum(p.numel() for p in MaskedLM(spec).parameters()) for spec in specs)
    return modern, classic
