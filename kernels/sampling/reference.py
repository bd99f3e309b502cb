"""Sampling in float64 numpy, one row at a time with full sorts: the definition that the fast paths are tested against."""

from __future__ import annotations

import numpy as np

from kernels.sampling.batch import SamplingRow
from kernels.sampling.philox import uniform

GREEDY_TEMPERATURE = 1e-5
"""A temperature below this is greedy (1 / T could overflow); vLLM draws the same line."""


def adjusted_logits(logits_V: np.ndarray, row: SamplingRow) -> np.ndarray:
    """Logits after bias, bans and penalties, float64 [V].

    Repetition penalty (Keskar et al., "CTRL", 2019) over prompt and output: positive logits are divided, negative ones
    multiplied by it. Then ``frequency_penalty * count + presence_penalty`` is subtracted for tokens of the output (OpenAI).
    """
    x = logits_V.astype(np.float64)
    for token, value in row.bias.items():
        x[token] += value
    x[list(row.banned_ids)] = -np.inf
    if row.has_penalty and row.counts is not None:
        ids, counts = row.counts.ids, row.counts.output_counts
        seen = x[ids]
        seen = np.where(seen > 0, seen / row.repetition_penalty, seen * row.repetition_penalty)
        x[ids] = seen - row.frequency_penalty * counts - row.presence_penalty * (counts > 0)
    return x


def probabilities(logits_V: np.ndarray, row: SamplingRow) -> np.ndarray:
    """The exact distribution the token is drawn from, float64 [V]; zero for tokens that are not kept.

    Of softmax(adjusted / temperature), min-p keeps tokens of at least ``min_p`` times the largest probability; top-k the first k
    in the order (logit descending, id ascending); top-p, over what is left and renormalised, the shortest prefix of that order
    whose probability reaches ``top_p`` (Holtzman et al., 2020).
    """
    x = adjusted_logits(logits_V, row)
    order = np.argsort(-x, kind="stable")
    p = np.zeros(len(x))
    if row.temperature < GREEDY_TEMPERATURE:
        p[order[0]] = 1.0
        return p
    weight = np.exp((x[order] - x[order[0]]) / row.temperature)
    weight[weight < row.min_p] = 0.0
    if row.top_k > 0:
        weight[row.top_k :] = 0.0
    if row.top_p < 1.0:
        reached = np.cumsum(weight) >= row.top_p * weight.sum()
        weight[np.argmax(reached) + 1 :] = 0.0
    p[order] = weight / weight.sum()
    return p


def sample_row(logits_V: np.ndarray, row: SamplingRow) -> int:
    """The first token, by id, whose cumulative probability exceeds the uniform number of (seed, position)."""
    p = probabilities(logits_V, row)
    cumulative = np.cumsum(p)
    chosen = int(np.searchsorted(cumulative, uniform(row.seed, row.position) * cumulative[-1], side="right"))
    return min(chosen, int(np.flatnonzero(p)[-1]))


def log_softmax(logits_V: np.ndarray) -> np.ndarray:
    """Log-probabilities of the raw logits, float64 [V]: what is reported as logprobs."""
    x = logits_V.astype(np.float64)
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


def top(logits_V: np.ndarray, n: int) -> np.ndarray:
    """Ids of the n largest logits, descending, equal ones by ascending id."""
    return np.argsort(-logits_V.astype(np.float64), kind="stable")[:n]
