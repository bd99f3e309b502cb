"""The two back ends of guided attention against each other: differences, and operations and memory as torch counts them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from actors.cooccurrence import PairTable
from apps.mcmisp.config import McmispConfig
from apps.mcmisp.data.shards import PackedRows
from apps.mcmisp.training.loop import Pretraining
from benchmarks.mcmisp.steps import loop_of
from kernels.guided_attention import Rows, log_weights_of_rows


def largest_difference(config: McmispConfig, rows: PackedRows, table: PairTable) -> tuple[float, float]:
    """Of loss, and of any gradient of the model, between rows and maps; float32, one step from the same weights."""
    found = []
    for backend in ("maps", "rows"):
        one = config.model_copy(
            update={
                "guidance": config.guidance.model_copy(update={"backend": backend}),
                "training": config.training.model_copy(update={"precision": "fp32", "clip_norm": None}),
            }
        )
        loop = loop_of(one, "guided", rows, table)
        gradients: list[torch.Tensor] = []

        def keep(factor: float, loop: Pretraining = loop, to: list[torch.Tensor] = gradients) -> None:
            to.extend(p.grad.clone() for p in loop.model.parameters() if p.grad is not None)

        loop.optimizers.step = keep  # type: ignore[method-assign]
        outcome = loop.one_step()
        found.append((outcome.loss.detach(), gradients))
    (loss_a, gradients_a), (loss_b, gradients_b) = found
    largest = max(float((a - b).abs().max()) for a, b in zip(gradients_a, gradients_b, strict=True))
    return float((loss_a - loss_b).abs()), largest


@dataclass(frozen=True)
class Price:
    """Of one layer, forward and backward."""

    flops: int
    saved_bytes: int


def prices(size: int, heads: int, guided: int, head_dim: int, batch: int, error_share: float) -> dict[str, Price]:
    """Full maps of all heads, as ``output_attentions`` gives them, and rows of the guided heads at the errors."""
    g = torch.Generator().manual_seed(0)
    errors = torch.rand(batch, size, generator=g) < error_share
    rows = Rows.at(errors)
    over = torch.ones(len(rows), size, dtype=torch.bool)

    def maps() -> torch.Tensor:
        return (q @ k.transpose(-2, -1) * head_dim**-0.5).softmax(-1)[rows.sequence_E, :guided, rows.position_E]

    def only_rows() -> torch.Tensor:
        return log_weights_of_rows(q[:, :guided], k[:, :guided], rows, over, head_dim**-0.5)

    found = {}
    for name, compute in {"maps": maps, "rows": only_rows}.items():
        q, k = (torch.randn(batch, heads, size, head_dim, generator=g).requires_grad_() for _ in range(2))
        inputs = {q.untyped_storage().data_ptr(), k.untyped_storage().data_ptr()}
        saved: dict[int, int] = {}

        def note(t: torch.Tensor, inputs: set[int] = inputs, saved: dict[int, int] = saved) -> torch.Tensor:
            # Of float tensors alone, each storage once; q and k are kept in either case.
            if t.is_floating_point() and t.untyped_storage().data_ptr() not in inputs:
                saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            result = compute()
            held = sum(saved.values())
            result.sum().backward()
        found[name] = Price(flops.get_total_flops(), held)
    return found
