"""Which tokens are masked and what stands in their place: functions of seed, step and row number, not of who computes them.

Uniform (Devlin et al. 2019), or adaptive by difficulty: words that the model mispredicts more often are masked more often
(after Edman and Fraser 2025, arXiv 2510.20475, whose details differ).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from apps.mcmisp.data.tokenizer import MASK, SPECIAL
from apps.training.position import mix

_GOLDEN, _MIX1, _MIX2 = (
    -7046029254386353131,
    -4658895280553007687,
    -7723592293110705685,
)  # SplitMix64's constants as int64


def uniform(seed: int, step: int, row_B: torch.Tensor, columns: int, stream: int = 0) -> torch.Tensor:
    """Numbers in [0, 1) [B, columns], float64; a hash (SplitMix64's finaliser) of seed, step, row, column and ``stream``."""
    column = torch.arange(columns, device=row_B.device, dtype=torch.int64)
    key = row_B.to(torch.int64)[:, None] * 1_000_003 + column[None]
    value = _finalise(_finalise(key * _GOLDEN) + mix(seed, step, stream))
    return ((value >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def _finalise(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class Masked:
    """``ids_BS`` with masks; ``chosen_BS`` true where a word is to be predicted; ``chosen_M`` the same as flat positions."""

    ids_BS: torch.Tensor
    chosen_BS: torch.Tensor
    chosen_M: torch.Tensor


class Difficulty:
    """Error rate of each word, for adaptive masking: a running mean over the batches in which the word was predicted."""

    def __init__(self, vocab_size: int, prior: float = 20.0, strength: float = 1.0, decay: float = 0.99):
        """``prior``: predictions' worth of the overall rate that a word begins with; ``strength`` 0: uniform masking."""
        self.prior, self.strength, self.decay = prior, strength, decay
        self.errors_V = torch.zeros(vocab_size, dtype=torch.float64)
        self.seen_V = torch.zeros(vocab_size, dtype=torch.float64)

    def observe(self, seen_V: torch.Tensor, errors_V: torch.Tensor) -> None:
        """Counts of a step over all workers."""
        self.seen_V = self.seen_V * self.decay + seen_V.double().cpu()
        self.errors_V = self.errors_V * self.decay + errors_V.double().cpu()

    def weights(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Relative masking weight of each token, mean 1 in each row."""
        overall = self.errors_V.sum() / self.seen_V.sum().clamp(min=1)
        rate = (self.errors_V + self.prior * overall) / (self.seen_V + self.prior)
        weight = (0.1 + rate).pow(self.strength).to(ids_BS.device)[ids_BS]
        words = (ids_BS >= len(SPECIAL)).double()
        return weight * words * (words.sum(1, keepdim=True) / (weight * words).sum(1, keepdim=True).clamp(min=1e-9))

    def state_dict(self) -> dict[str, Any]:
        return {"errors": self.errors_V, "seen": self.seen_V}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.errors_V, self.seen_V = state["errors"].cpu(), state["seen"].cpu()


def mask_rows(
    ids_BS: torch.Tensor,
    row_B: torch.Tensor,
    *,
    rate: float,
    seed: int,
    step: int,
    vocab_size: int,
    difficulty: Difficulty | None = None,
    random_share: float = 0.1,
    keep_share: float = 0.1,
) -> Masked:
    """Chooses a ``rate`` of each row's words; ``random_share`` of them become random words, ``keep_share`` stay, the rest [MASK].

    Exactly round(rate x words) are chosen in each row (by the smallest of exponential variates over the weights, Efraimidis and
    Spirakis 2006), so that steps cost the same.
    """
    words = ids_BS >= len(SPECIAL)
    draws = uniform(seed, step, row_B, ids_BS.shape[1])
    weights = torch.ones_like(draws) if difficulty is None else difficulty.weights(ids_BS)
    keys = torch.where(words, -torch.log1p(-draws) / weights.clamp(min=1e-9), torch.inf)
    count = (words.sum(1) * rate).round().long().clamp(min=1).minimum(words.sum(1))
    chosen = keys.argsort(1).argsort(1) < count[:, None]
    what = uniform(seed, step, row_B, ids_BS.shape[1], stream=1)
    other = uniform(seed, step, row_B, ids_BS.shape[1], stream=2)
    random_words = len(SPECIAL) + (other * (vocab_size - len(SPECIAL))).long()
    masked = torch.where(chosen & (what >= keep_share), MASK, ids_BS)
    masked = torch.where(chosen & (what >= 1 - random_share), random_words, masked)
    return Masked(masked, chosen, chosen.flatten().nonzero().squeeze(1))


def mask_rate(step: int, steps: int, first: float, last: float) -> float:
    """Linear from ``first`` to ``last``: much masking early, what evaluation uses late."""
    return first + (last - first) * min(1.0, step / max(1, steps - 1))


__all__ = ["Difficulty", "Masked", "mask_rate", "mask_rows", "uniform"]
