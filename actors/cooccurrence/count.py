"""Counting pairs of words that stand near each other: exact integers, so that the order of addition never shows.

A pair is unordered and has the key ``low * V + high``. Counts travel as sorted keys with counts (``PairCounts``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.cooccurrence.errors import CooccurrenceError
from actors.cooccurrence.settings import CooccurrenceSettings, Lexicon

SORTED_AT_ONCE = 1 << 23
"""Keys sorted together: large enough for few merges, small enough for the cache and the memory of a worker."""


@dataclass(frozen=True)
class PairCounts:
    """``keys`` int64, strictly ascending; ``counts`` int64, positive; ``units``: tokens that were counted."""

    keys: np.ndarray
    counts: np.ndarray
    units: int = 0

    @classmethod
    def empty(cls) -> PairCounts:
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.counts.nbytes


def count_pairs(ids: np.ndarray, document: np.ndarray, lexicon: Lexicon, settings: CooccurrenceSettings) -> PairCounts:
    """Pairs in packed rows: ``ids`` and ``document`` [rows, size]; a pair lies in one document of one row.

    Raises:
        CooccurrenceError: ids beyond the vocabulary, or flags that the settings need are missing.
    """
    lexicon.check(settings)
    if ids.shape != document.shape or ids.ndim != 2:
        raise CooccurrenceError(f"ids and document must be two equal matrices, not {ids.shape} and {document.shape}.")
    if ids.size and (int(ids.max()) >= lexicon.size or int(ids.min()) < 0):
        raise CooccurrenceError(f"A token id lies outside of the vocabulary of {lexicon.size}.")
    word = ~np.isin(ids, lexicon.special) if lexicon.special else np.ones(ids.shape, bool)
    span = document.astype(np.int64)
    if settings.span == "sentence":
        ends = np.asarray(lexicon.ends_sentence, dtype=np.int64)[ids]
        span = span * (ids.shape[1] + 1) + np.cumsum(ends, axis=1) - ends
    # A word index is needed to count distances in words; it grows by one where a word begins.
    index = np.cumsum(np.asarray(lexicon.begins_word)[ids], axis=1) if settings.unit == "word" else None
    # Where V * V fits, keys of 32 bits sort twice as fast.
    key_type = np.int32 if lexicon.size**2 < 2**31 else np.int64
    typed = ids.astype(key_type)
    size = ids.shape[1]
    limit = size - 1 if settings.window == 0 or index is not None else min(settings.window, size - 1)
    waiting: list[np.ndarray] = []
    sums = _Sums()
    for offset in range(1, limit + 1):
        left, right = slice(None, size - offset), slice(offset, None)
        paired = word[:, left] & word[:, right] & (span[:, left] == span[:, right])
        if index is not None:
            apart = index[:, right] - index[:, left]
            paired &= apart >= 1
            if settings.window:
                near = apart <= settings.window
                if not near.any():
                    break  # distance in words grows with the distance in tokens
                paired &= near
        a, b = typed[:, left][paired], typed[:, right][paired]
        waiting.append(np.minimum(a, b) * key_type(lexicon.size) + np.maximum(a, b))
        if sum(map(len, waiting)) >= SORTED_AT_ONCE:
            sums.add(_tally(np.concatenate(waiting)))
            waiting = []
    if waiting:
        sums.add(_tally(np.concatenate(waiting)))
    total = sums.total()
    return PairCounts(total.keys, total.counts, int(word.sum()))


def merge(parts: Sequence[PairCounts]) -> PairCounts:
    """Their sum."""
    parts = [part for part in parts if len(part) or part.units]
    if not parts:
        return PairCounts.empty()
    units = sum(part.units for part in parts)
    if len(parts) == 1:
        return parts[0]
    keys = np.concatenate([part.keys for part in parts])
    counts = np.concatenate([part.counts for part in parts])
    order = np.argsort(keys, kind="stable")  # a merge sort: cheap for parts that are sorted already
    keys, counts = keys[order], counts[order]
    starts = _starts(keys)
    return PairCounts(keys[starts], np.add.reduceat(counts, starts) if len(starts) else counts, units)


def decayed(counts: PairCounts, factor: float) -> PairCounts:
    """Counts times ``factor``, rounded down; pairs that reach zero go. A function of each pair's count alone."""
    if factor >= 1:
        return counts
    kept = np.floor(counts.counts * factor).astype(np.int64)
    alive = kept > 0
    return PairCounts(counts.keys[alive], kept[alive], counts.units)


def split(counts: PairCounts, vocab_size: int, shards: int) -> list[PairCounts]:
    """The part of each shard: that of a pair follows from its first word alone, hashed, since frequent words have low ids."""
    if shards == 1:
        return [counts]
    owner = shard_of(counts.keys // vocab_size, shards)
    return [
        PairCounts(counts.keys[owner == shard], counts.counts[owner == shard], counts.units if shard == 0 else 0)
        for shard in range(shards)
    ]


def shard_of(word: np.ndarray, shards: int) -> np.ndarray:
    """Fibonacci hashing (Knuth, TAOCP 3, 6.4) of the word's id."""
    mixed = (word.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    return (mixed % np.uint64(shards)).astype(np.int64)


class _Sums:
    """Sums parts of similar size first (a binary counter), so that a pair is moved a logarithmic number of times."""

    def __init__(self) -> None:
        self._stack: list[PairCounts] = []

    def add(self, part: PairCounts) -> None:
        self._stack.append(part)
        while len(self._stack) > 1 and len(self._stack[-2]) <= 2 * len(self._stack[-1]):
            self._stack.append(merge([self._stack.pop(), self._stack.pop()]))

    def total(self) -> PairCounts:
        self._stack = [merge(self._stack)]
        return self._stack[0]


def _tally(keys: np.ndarray) -> PairCounts:
    keys.sort()
    starts = _starts(keys)
    counts = np.diff(starts, append=len(keys))
    return PairCounts(keys[starts].astype(np.int64), counts.astype(np.int64))


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Where a new value begins."""
    if not len(ordered):
        return np.zeros(0, np.int64)
    return np.concatenate([[0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1])
