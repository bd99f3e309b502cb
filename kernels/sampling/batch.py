"""What the sampler is told about each row of a batch, and what it answers. Plain data over packed CPU tensors.

An engine keeps one ``TokenCounts`` per sequence that has penalties and builds a ``SamplingBatch`` from ``SamplingRow``s at every
step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch

REAL_FIELDS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
INTEGER_FIELDS = ("top_k", "seed", "position", "num_logprobs")


class TokenCounts:
    """Which tokens a sequence's penalties see: every distinct token of prompt and output, and how often it was output.

    O(1) per generated token; follows from the tokens alone, so a migrated or recomputed sequence rebuilds the same.
    """

    def __init__(self, prompt_ids: Iterable[int], output_ids: Iterable[int] = ()):
        ids = np.fromiter(dict.fromkeys(prompt_ids), dtype=np.int64)
        self._size = len(ids)
        self._ids = np.empty(max(64, 2 * self._size), dtype=np.int64)
        self._ids[: self._size] = ids
        self._counts = np.zeros(len(self._ids), dtype=np.int64)
        self._index = {int(token): i for i, token in enumerate(ids)}
        for token in output_ids:
            self.append(token)

    def append(self, token_id: int) -> None:
        """Count one more output token."""
        index = self._index.get(token_id)
        if index is None:
            if self._size == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            index = self._index[token_id] = self._size
            self._ids[index], self._counts[index] = token_id, 0
            self._size += 1
        self._counts[index] += 1

    @property
    def ids(self) -> np.ndarray:
        """Distinct token ids, int64."""
        return self._ids[: self._size]

    @property
    def output_counts(self) -> np.ndarray:
        """Occurrences of each of ``ids`` in the output, int64; 0 for a token of the prompt alone."""
        return self._counts[: self._size]


@dataclass(frozen=True)
class SamplingRow:
    """One row's parameters; the defaults are plain sampling from softmax(logits). Ranges are checked by SamplingBatch."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    position: int = 0
    """Position of the token to be sampled: (seed, position) gives its random number."""
    num_logprobs: int = -1
    """-1: none; n >= 0: of the chosen token and the n likeliest."""
    counts: TokenCounts | None = None
    """Needed when a penalty is set."""
    banned_ids: Sequence[int] = ()
    """Tokens that must not be chosen (end-of-sequence and stop ids before min_tokens)."""
    bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""

    @property
    def has_penalty(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True)
class SamplingBatch:
    """Per-row parameters of R rows, packed into few tensors because a decode step builds them anew."""

    real: torch.Tensor
    """float64 [R, 6], columns REAL_FIELDS."""
    integer: torch.Tensor
    """int64 [R, 4], columns INTEGER_FIELDS."""
    penalty_start: torch.Tensor
    """int64 [R + 1]: row r's penalties see tokens penalty_ids[penalty_start[r] : penalty_start[r + 1]]."""
    penalty_ids: torch.Tensor
    """int64, distinct within a row."""
    penalty_counts: torch.Tensor
    """int64: occurrences in the output."""
    bias_start: torch.Tensor
    """int64 [R + 1]"""
    bias_ids: torch.Tensor
    """int64, distinct within a row."""
    bias_values: torch.Tensor
    """float32, added to the logit; -inf bans the token."""

    def __len__(self) -> int:
        return self.integer.shape[0]

    @staticmethod
    def from_rows(rows: Sequence[SamplingRow]) -> SamplingBatch:
        """Pack ``rows``; ValueError names a field that is out of its range."""
        for row in rows:
            _check(row)
        counts = [row.counts if row.has_penalty and row.counts is not None else _NO_COUNTS for row in rows]
        biases = [
            row.bias if not row.banned_ids else {**row.bias, **dict.fromkeys(row.banned_ids, -math.inf)} for row in rows
        ]
        return SamplingBatch(
            real=torch.tensor([[getattr(row, name) for name in REAL_FIELDS] for row in rows], dtype=torch.float64).view(
                -1, 6
            ),
            integer=torch.tensor(
                [[row.top_k, _signed(row.seed), _signed(row.position), row.num_logprobs] for row in rows],
                dtype=torch.int64,
            ).view(-1, 4),
            penalty_start=_starts([len(c.ids) for c in counts]),
            penalty_ids=torch.from_numpy(np.concatenate([_NO_COUNTS.ids, *(c.ids for c in counts)])),
            penalty_counts=torch.from_numpy(np.concatenate([_NO_COUNTS.ids, *(c.output_counts for c in counts)])),
            bias_start=_starts([len(b) for b in biases]),
            bias_ids=torch.tensor([i for b in biases for i in b], dtype=torch.int64),
            bias_values=torch.tensor([x for b in biases for x in b.values()], dtype=torch.float32),
        )


@dataclass(frozen=True)
class SamplingResult:
    """The chosen tokens of R rows. N is the largest num_logprobs of the batch (0 when no row wants alternatives)."""

    token_ids: torch.Tensor
    """int64 [R]; -1 where the logits hold a NaN or +inf, or no token may be chosen: the caller must fail that request."""
    logprobs: torch.Tensor
    """float32 [R]: log-softmax of the raw logits (before bias, penalties and temperature); NaN for rows that want none."""
    top_ids: torch.Tensor
    """int64 [R, N]: the likeliest tokens of the raw logits, descending, equal ones by ascending id; -1 beyond a row's n."""
    top_logprobs: torch.Tensor
    """float32 [R, N]; NaN beyond a row's n."""


_NO_COUNTS = TokenCounts(())


def _signed(value: int) -> int:
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


def _starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int64)


def _check(row: SamplingRow) -> None:
    # written so that NaN fails as well
    if not 0.0 <= row.temperature < math.inf:
        raise ValueError(f"temperature must be finite and not negative, not {row.temperature}")
    if not 0.0 < row.top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], not {row.top_p}")
    if not 0.0 <= row.min_p <= 1.0:
        raise ValueError(f"min_p must be in [0, 1], not {row.min_p}")
    if row.top_k < 0:
        raise ValueError(f"top_k must not be negative, not {row.top_k}")
    if not 0.0 < row.repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty must be finite and positive, not {row.repetition_penalty}")
    if not (math.isfinite(row.presence_penalty) and math.isfinite(row.frequency_penalty)):
        raise ValueError("presence_penalty and frequency_penalty must be finite")
    if row.has_penalty and row.counts is None:
        raise ValueError("a row with penalties needs its token counts")
    if any(math.isnan(value) or value == math.inf for value in row.bias.values()):
        raise ValueError("a logit bias must be a number below infinity")
    if row.num_logprobs < -1:
        raise ValueError(f"num_logprobs must be -1 or more, not {row.num_logprobs}")
