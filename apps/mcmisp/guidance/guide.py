"""From mis-predicted positions and what the guided heads saw to the guided loss, on either back end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from actors.cooccurrence import PairTable
from apps.mcmisp.guidance.choice import guided_heads
from apps.mcmisp.guidance.config import GuidanceConfig
from apps.mcmisp.guidance.target import divergence, target_log_weights
from apps.mcmisp.model.attention import Backend, Captured
from apps.program.errors import UserError
from kernels.guided_attention import (
    Mixture,
    Rows,
    TableView,
    guided_kl,
    kept_keys,
    log_weights_of_maps,
    log_weights_of_rows,
)
from kernels.guided_attention.reference import same_document


@dataclass(frozen=True)
class Errors:
    """Mis-predicted positions of a batch in the order of their places: ``rows``, the words predicted and the right ones [E].

    ``draws_E`` in [0, 1): for the random control. ``kept_BS``: keys that a target may speak of.
    """

    rows: Rows
    wrong_E: torch.Tensor
    right_E: torch.Tensor
    draws_E: torch.Tensor
    kept_BS: torch.Tensor


@dataclass(frozen=True)
class GuideResult:
    """``total``: sum over errors of the mean over guided heads, to be divided by the number of errors of all workers."""

    total: torch.Tensor
    errors: int


class Guide:
    """Holds the table and the choices; knows nothing of training."""

    def __init__(self, config: GuidanceConfig, table: PairTable, unigram_V: torch.Tensor, special: Sequence[int]):
        """``unigram_V``: frequency of each word, summing to 1."""
        self.config, self.table = config, table
        self.unigram_V = unigram_V.double()
        self._cumulative = self.unigram_V.cumsum(0)
        self._special = torch.tensor(sorted(special), dtype=torch.int64)
        if config.backend == "fused" and not self.fusable():
            raise UserError(
                "guidance.backend=fused needs shape=softmax, divergence=kl and a dense co-occurrence table."
            )

    def fusable(self) -> bool:
        """Whether the fused kernel computes what the choices ask for."""
        return self.config.shape == "softmax" and self.config.divergence == "kl" and self.table.dense is not None

    def backend(self, size: int, device: torch.device) -> Backend:
        """What the model must hand out."""
        if self.config.backend == "auto":
            return "maps" if device.type == "cpu" and size <= self.config.maps_up_to else "rows"
        return "maps" if self.config.backend == "maps" else "rows"

    def heads(self, layers: int, heads: int) -> dict[int, tuple[int, ...]]:
        """Layer -> guided heads."""
        return guided_heads(self.config, layers, heads)

    def gate(self, wrong_M: torch.Tensor, probability_M: torch.Tensor) -> torch.Tensor:
        """True [M] where a wrong prediction is worth learning from."""
        if self.config.gate == "all":
            return torch.ones_like(wrong_M, dtype=torch.bool)
        usual = self.unigram_V.to(probability_M.device)[wrong_M]
        return probability_M.double() > self.config.gate_factor * usual

    def kept(self, ids_BS: torch.Tensor, chosen_BS: torch.Tensor) -> torch.Tensor:
        """True [B, S] at words: no special tokens, and no masked positions unless ``mask_keys`` is in.

        ``ids_BS`` are the original words, so that a masked one that is kept counts by the word behind the mask.
        """
        kept = ~torch.isin(ids_BS, self._special.to(ids_BS.device))
        return kept if self.config.mask_keys == "in" else kept & ~chosen_BS

    def loss(
        self, captures: Sequence[Captured], errors: Errors, document_BS: torch.Tensor, ids_BS: torch.Tensor
    ) -> GuideResult:
        """``ids_BS``: the words that keys stand for. Errors whose row has no kept keys count with divergence 0."""
        heads = sum(_heads_of(c) for c in captures)
        if not len(errors.rows) or not heads:
            total = sum((_any(c).float().sum() * 0.0 for c in captures), torch.zeros((), device=ids_BS.device))
            return GuideResult(total, 0)
        fused = self.config.backend == "fused" or (self.config.backend == "auto" and ids_BS.is_cuda and self.fusable())
        if fused and captures[0].q_BGSD is not None:
            return GuideResult(self._fused(captures, errors, document_BS, ids_BS) / heads, len(errors.rows))
        kept_ES = kept_keys(errors.rows, errors.kept_BS, document_BS)
        log_g = target_log_weights(self.badness(errors, ids_BS), kept_ES, self.config)
        total = torch.zeros((), device=ids_BS.device)
        for captured in captures:
            log_a = self.log_weights(captured, errors.rows, kept_ES, document_BS)
            total = total + divergence(self.config.divergence, log_g, log_a, kept_ES).sum()
        return GuideResult(total / heads, len(errors.rows))

    def log_weights(
        self, captured: Captured, rows: Rows, kept_ES: torch.Tensor, document_BS: torch.Tensor
    ) -> torch.Tensor:
        """log A [E, G, S] of the error rows, from whatever the layer handed out."""
        over = kept_ES if self.config.renormalise else same_document(rows, document_BS)
        if captured.scores_BGSS is not None:
            return log_weights_of_maps(captured.scores_BGSS, rows, over)
        if captured.q_BGSD is None or captured.k_BGSD is None:
            raise ValueError("a layer handed out neither scores nor q and k")
        return log_weights_of_rows(captured.q_BGSD, captured.k_BGSD, rows, over, captured.scale)

    def badness(self, errors: Errors, ids_BS: torch.Tensor) -> torch.Tensor:
        """Scores [E, S] by which keys lose weight: how much each goes with the wrong word (or as ``target`` has it)."""
        keys_ES = ids_BS[errors.rows.sequence_E]
        if self.config.target == "reversed":
            return -self.table.scores(errors.wrong_E, keys_ES)
        if self.config.target == "random":
            return self.table.scores(self._drawn(errors), keys_ES)
        scores = self.table.scores(errors.wrong_E, keys_ES)
        return scores - self.table.scores(errors.right_E, keys_ES) if self.config.target == "contrast" else scores

    def _drawn(self, errors: Errors) -> torch.Tensor:
        """A word for each error, drawn by frequency: the control's scores look like the method's and mean nothing."""
        cumulative = self._cumulative.to(errors.draws_E.device)
        place = torch.searchsorted(cumulative, errors.draws_E.double() * cumulative[-1], right=True)
        return place.clamp(max=len(cumulative) - 1)

    def _fused(
        self, captures: Sequence[Captured], errors: Errors, document_BS: torch.Tensor, ids_BS: torch.Tensor
    ) -> torch.Tensor:
        per_nat = 1.0 / self.config.temperature
        first = self._drawn(errors) if self.config.target == "random" else errors.wrong_E
        mixture = Mixture(first, per_nat if self.config.target == "reversed" else -per_nat)
        if self.config.target == "contrast":
            mixture = Mixture(first, -per_nat, errors.right_E, per_nat)
        view = TableView(self.table.dense_on(ids_BS.device), self.table.step)
        total = torch.zeros((), device=ids_BS.device)
        for captured in captures:
            if captured.q_BGSD is None or captured.k_BGSD is None:
                raise ValueError("the fused kernel needs q and k of every guided layer")
            total = total + guided_kl(
                captured.q_BGSD, captured.k_BGSD, errors.rows, errors.kept_BS, document_BS, ids_BS, view, mixture,
                captured.scale, renormalise=self.config.renormalise,
            ).sum()  # fmt: skip
        return total


def _any(captured: Captured) -> torch.Tensor:
    tensor = captured.scores_BGSS if captured.scores_BGSS is not None else captured.q_BGSD
    if tensor is None:
        raise ValueError("a layer handed out neither scores nor q and k")
    return tensor


def _heads_of(captured: Captured) -> int:
    return _any(captured).shape[1]


__all__ = ["Errors", "Guide", "GuideResult"]
