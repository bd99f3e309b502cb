"""Guided attention in plain torch: what the rows and maps back ends compute, and the oracle of the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """E query rows: ``sequence_E`` (ascending) and ``position_E``, int64; ``start`` int64 [B + 1]: sequence b owns rows

    ``start[b] ... start[b + 1] - 1``; ``longest``: rows of the sequence that has most.
    """

    sequence_E: torch.Tensor
    position_E: torch.Tensor
    start: torch.Tensor
    longest: int

    @classmethod
    def at(cls, wanted_BS: torch.Tensor) -> Rows:
        """The rows where ``wanted_BS`` is true."""
        sequence, position = wanted_BS.nonzero(as_tuple=True)
        counts = wanted_BS.sum(1)
        start = torch.zeros(len(counts) + 1, dtype=torch.int64, device=wanted_BS.device)
        torch.cumsum(counts, 0, out=start[1:])
        return cls(sequence, position, start, int(counts.max()) if counts.numel() else 0)

    def __len__(self) -> int:
        return len(self.sequence_E)


@dataclass(frozen=True)
class TableView:
    """Pre-computed scores of word pairs, int8 [V, V], symmetric; a score is ``table_VV * step``."""

    table_VV: torch.Tensor
    step: float


@dataclass(frozen=True)
class Mixture:
    """Target logits of row e at key j: ``first * score[first_E[e], x_j] + second * score[second_E[e], x_j]``.

    McMisP's target is first = -1 / temperature with the wrongly predicted word; the corrective one adds the right word with
    second = +1 / temperature.
    """

    first_E: torch.Tensor
    first: float
    second_E: torch.Tensor | None = None
    second: float = 0.0


def kept_keys(rows: Rows, kept_BS: torch.Tensor, document_BS: torch.Tensor) -> torch.Tensor:
    """True [E, S] at the keys that the row's target speaks of: kept, of its document, not itself."""
    mine = document_BS[rows.sequence_E, rows.position_E]
    kept = kept_BS[rows.sequence_E] & (document_BS[rows.sequence_E] == mine[:, None])
    kept[torch.arange(len(rows), device=kept.device), rows.position_E] = False
    return kept


def log_weights_of_maps(scores_BGSS: torch.Tensor, rows: Rows, over_ES: torch.Tensor) -> torch.Tensor:
    """log A [E, G, S] of the wanted rows of full score maps, normalised over ``over_ES``; -inf elsewhere."""
    return _log_softmax(scores_BGSS[rows.sequence_E, :, rows.position_E].float(), over_ES)


def log_weights_of_rows(
    q_BGSD: torch.Tensor, k_BGSD: torch.Tensor, rows: Rows, over_ES: torch.Tensor, scale: float
) -> torch.Tensor:
    """The same from q and k: one product [G, R, D] x [G, D, S] a sequence, R = ``rows.longest`` (shorter ones are padded)."""
    batch, heads, size, dim = q_BGSD.shape
    if not len(rows):
        return q_BGSD.new_zeros(0, heads, size, dtype=torch.float32)
    rank = torch.arange(len(rows), device=q_BGSD.device) - rows.start[rows.sequence_E]
    picked = torch.zeros(batch, rows.longest, dtype=torch.int64, device=q_BGSD.device)
    picked[rows.sequence_E, rank] = rows.position_E
    index = picked[:, :, None].expand(batch, rows.longest, dim)
    # Head by head: a product over a slice of all heads would first copy its keys, and keep the copy for backward.
    scores = [
        (q_BGSD[:, head].gather(1, index).float() * scale) @ k_BGSD[:, head].float().transpose(-2, -1)
        for head in range(heads)
    ]
    return _log_softmax(torch.stack([one[rows.sequence_E, rank] for one in scores], dim=1), over_ES)


def target_logits(rows: Rows, ids_BS: torch.Tensor, table: TableView, mixture: Mixture) -> torch.Tensor:
    """The mixture's logits [E, S], float32."""
    keys_ES = ids_BS[rows.sequence_E]
    logits = table.table_VV[mixture.first_E[:, None], keys_ES].float() * (mixture.first * table.step)
    if mixture.second_E is not None:
        logits = logits + table.table_VV[mixture.second_E[:, None], keys_ES].float() * (mixture.second * table.step)
    return logits


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
    renormalise: bool,
) -> torch.Tensor:
    """See the package's ``guided_kl``."""
    kept_ES = kept_keys(rows, kept_BS, document_BS)
    over_ES = kept_ES if renormalise else same_document(rows, document_BS)
    log_a = log_weights_of_rows(q_BGSD, k_BGSD, rows, over_ES, scale)
    log_g = _log_softmax(target_logits(rows, ids_BS, table, mixture)[:, None], kept_ES)
    return kl(log_g, log_a, kept_ES)


def same_document(rows: Rows, document_BS: torch.Tensor) -> torch.Tensor:
    """True [E, S] at the keys that the row attends to."""
    return document_BS[rows.sequence_E] == document_BS[rows.sequence_E, rows.position_E][:, None]


def kl(log_g: torch.Tensor, log_a: torch.Tensor, kept_ES: torch.Tensor) -> torch.Tensor:
    """sum over kept keys of g (log g - log a) [E, G]."""
    kept = kept_ES[:, None]
    difference = torch.where(kept, log_g, 0.0) - torch.where(kept, log_a, 0.0)
    return (torch.where(kept, log_g.exp(), 0.0) * difference).sum(-1)


def _log_softmax(scores_EGS: torch.Tensor, over_ES: torch.Tensor) -> torch.Tensor:
    """-inf outside ``over_ES``; rows with nothing there are -inf throughout, with zero gradients instead of nan."""
    over = over_ES[:, None]
    masked = scores_EGS.masked_fill(~over, -1e30)
    return torch.log_softmax(masked, dim=-1).masked_fill(~over, float("-inf"))
