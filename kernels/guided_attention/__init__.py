"""Attention rows of mis-predicted positions, and their divergence from a target made of word co-occurrence.

Two exact back ends beside ordinary attention: *maps* reads rows out of full score maps, *rows* recomputes only the wanted query
rows from q and k. A third, fused, path (Triton) goes from q, k and the co-occurrence table to the divergence of a row, and no
tensor as long as a row reaches memory. Shapes: B sequences of S positions, G guided heads of D dimensions, E wanted rows.

- ``rows``: a ``Rows``: which positions of which sequences, ordered by sequence.
- ``q_BGSD``, ``k_BGSD``: as the model's own scores were made of (rotated, normalised); any strides, last dimension contiguous.
- ``kept_BS``: keys that the target speaks of (unmasked, no special tokens); a row also leaves out itself and other documents.
"""

from __future__ import annotations

from typing import Literal

import torch

from kernels.guided_attention import reference
from kernels.guided_attention.reference import (
    Mixture,
    Rows,
    TableView,
    kept_keys,
    log_weights_of_maps,
    log_weights_of_rows,
)

__all__ = [
    "Mixture", "Rows", "TableView", "backend_for", "guided_kl", "kept_keys", "log_weights_of_maps", "log_weights_of_rows",
]  # fmt: skip

Backend = Literal["auto", "torch", "triton"]


def backend_for(device: torch.device) -> Literal["torch", "triton"]:
    """The fastest path to ``guided_kl`` that can run on ``device`` here."""
    if device.type != "cuda":
        return "torch"
    try:
        from kernels.guided_attention import triton  # noqa: F401
    except ImportError:
        return "torch"
    return "triton"


def guided_kl(
    q_BGSD: torch.Tensor,
    k_BGSD: torch.Tensor,
    rows: Rows,
    kept_BS: torch.Tensor,
    document_BS: torch.Tensor,
    ids_BS: torch.Tensor,
    table: TableView,
    mixture: Mixture,
    scale: float,
    *,
    renormalise: bool = True,
    backend: Backend = "auto",
) -> torch.Tensor:
    """KL(g || A) [E, G] in nats, differentiable in q and k; 0 for a row without kept keys.

    g = softmax over kept keys of ``mixture``'s sum of table rows; A = softmax(scale q k) over the kept keys, or without
    ``renormalise`` over all keys of the document (its kept entries then sum to less than 1).
    """
    chosen = backend_for(q_BGSD.device) if backend == "auto" else backend
    if chosen == "triton":
        from kernels.guided_attention import triton

        return triton.guided_kl(q_BGSD, k_BGSD, rows, kept_BS, document_BS, ids_BS, table, mixture, scale, renormalise)
    return reference.guided_kl(q_BGSD, k_BGSD, rows, kept_BS, document_BS, ids_BS, table, mixture, scale, renormalise)
