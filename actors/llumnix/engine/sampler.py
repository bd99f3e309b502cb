"""The step from logits to tokens: packs the running requests' sampling parameters and calls kernels.sampling.

Runs at every step, so what does not change of a request is packed once, into rows of arrays made once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch

from actors.llumnix.engine.request import TokenLogprob
from actors.llumnix.engine.sequence import Sequence
from kernels.sampling import SamplingBatch, TokenCounts, sample


@dataclass
class _Row:
    """A request's parameters in the columns of SamplingBatch."""

    real: np.ndarray
    integer: np.ndarray
    banned: np.ndarray
    """Tokens that may not come before min_tokens: end of sequence and stop ids."""


class Sampler:
    """Owns the arrays of a batch of up to ``max_rows`` rows."""

    def __init__(self, max_rows: int, vocab_size: int):
        self._vocab_size = vocab_size
        self._real = np.zeros((max_rows, 6))
        self._integer = np.zeros((max_rows, 4), dtype=np.int64)
        self._zeros = torch.zeros(max_rows + 1, dtype=torch.int64)
        self._no_ids = torch.zeros(0, dtype=torch.int64)
        self._no_values = torch.zeros(0, dtype=torch.float32)

    def sample(
        self, logits_RV: torch.Tensor, sequences: Items[Sequence]
    ) -> tuple[list[int], Items[TokenLogprob | None]]:
        """Next token of each sequence and its logprobs where asked for; -1 where the logits are not numbers."""
        result = sample(logits_RV, self.batch(sequences))
        token_ids: list[int] = result.token_ids.tolist()
        if all(seq.sampling.logprobs is None for seq in sequences):
            return token_ids, [None] * len(token_ids)
        logprobs = result.logprobs.tolist()
        top_ids, top_logprobs = result.top_ids.tolist(), result.top_logprobs.tolist()
        reported: list[TokenLogprob | None] = []
        for r, seq in enumerate(sequences):
            num = seq.sampling.logprobs
            if num is None:
                reported.append(None)
            else:
                top = tuple(zip(top_ids[r][:num], top_logprobs[r][:num], strict=True))
                reported.append(TokenLogprob(token_ids[r], logprobs[r], top))
        return token_ids, reported

    def batch(self, sequences: Items[Sequence]) -> SamplingBatch:
        """The kernel's parameters for one row a sequence; equal to ``SamplingBatch.from_rows``. Valid until the next call."""
        num = len(sequences)
        penalised = banning = False
        for r, seq in enumerate(sequences):
            row = seq.sampler_row
            if row is None:
                row = seq.sampler_row = _pack(seq, self._vocab_size)
            self._real[r] = row.real
            self._integer[r] = row.integer
            self._integer[r, 2] = len(seq.tokens)
            penalised |= seq.token_counts is not None
            banning |= seq.num_output < seq.sampling.min_tokens
        penalty_start, penalty_ids, penalty_counts = self._zeros[: num + 1], self._no_ids, self._no_ids
        if penalised:
            ids = [self._empty() if seq.token_counts is None else seq.token_counts.ids for seq in sequences]
            counts = [seq.token_counts.output_counts for seq in sequences if seq.token_counts is not None]
            penalty_start = _starts(ids)
            penalty_ids = torch.from_numpy(np.concatenate(ids))
            penalty_counts = torch.from_numpy(np.concatenate(counts))
        bias_start, bias_ids, bias_values = self._zeros[: num + 1], self._no_ids, self._no_values
        if banning:
            banned = [
                seq.sampler_row.banned if seq.num_output < seq.sampling.min_tokens else self._empty()
                for seq in sequences
            ]
            bias_start = _starts(banned)
            bias_ids = torch.from_numpy(np.concatenate(banned))
            bias_values = torch.full((len(bias_ids),), -math.inf)
        return SamplingBatch(
            torch.from_numpy(self._real[:num]),
            torch.from_numpy(self._integer[:num]),
            penalty_start,
            penalty_ids,
            penalty_counts,
            bias_start,
            bias_ids,
            bias_values,
        )

    @staticmethod
    def _empty() -> np.ndarray:
        return np.zeros(0, dtype=np.int64)


def _pack(seq: Sequence, vocab_size: int) -> _Row:
    p = seq.sampling
    if p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0:
        seq.token_counts = TokenCounts(seq.tokens[: seq.num_prompt], seq.tokens[seq.num_prompt :])
    return _Row(
        real=np.array([p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty]),
        integer=np.array([p.top_k, p.seed, 0, -1 if p.logprobs is None else p.logprobs], dtype=np.int64),
        banned=np.array(sorted(i for i in seq.stop_token_ids if i < vocab_size), dtype=np.int64),
    )


def _starts(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.cumsum([0, *map(len, parts)], dtype=np.int64))
