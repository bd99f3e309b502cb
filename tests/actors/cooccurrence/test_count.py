"""Counting: the loops of the definition, for every window, unit and span; sums do not depend on order or on who counted."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.cooccurrence import CooccurrenceError, CooccurrenceSettings, Lexicon, count_pairs, merge
from actors.cooccurrence.count import decayed, split

VOCAB = 11
SPECIAL = (0, 1)
BEGINS = np.array([True] * 7 + [False] * 4)
ENDS = np.array([i == 3 for i in range(VOCAB)])
LEXICON = Lexicon(VOCAB, SPECIAL, BEGINS, ENDS)


def by_loops(ids, document, options: CooccurrenceSettings) -> Counter:
    found: Counter = Counter()
    for row, docs in zip(ids, document, strict=True):
        words = np.cumsum(BEGINS[row])
        sentence = [sum(1 for t in row[:i] if ENDS[t]) for i in range(len(row))]
        for i in range(len(row)):
            for j in range(i + 1, len(row)):
                apart = words[j] - words[i] if options.unit == "word" else j - i
                if row[i] in SPECIAL or row[j] in SPECIAL or docs[i] != docs[j] or apart < 1:
                    continue
                if options.window and apart > options.window:
                    continue
                if options.span == "sentence" and sentence[i] != sentence[j]:
                    continue
                found[tuple(sorted((int(row[i]), int(row[j]))))] += 1
    return found


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6), window=st.integers(0, 5),
    unit=st.sampled_from(["subword", "word"]), span=st.sampled_from(["document", "sentence"]),
)  # fmt: skip
def test_pairs_are_those_of_the_definition(seed, window, unit, span):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, (3, 14))
    document = np.sort(rng.integers(0, 3, (3, 14)), axis=1)
    options = CooccurrenceSettings(window=window, unit=unit, span=span)
    got = count_pairs(ids, document, LEXICON, options)
    pairs = {(int(k) // VOCAB, int(k) % VOCAB): int(c) for k, c in zip(got.keys, got.counts, strict=True)}
    assert pairs == by_loops(ids, document, options)
    assert (np.diff(got.keys) > 0).all()
    assert got.units == (~np.isin(ids, SPECIAL)).sum()


def test_parts_sum_to_the_whole_in_any_order_and_any_sharding():
    rng = np.random.default_rng(0)
    ids, document = rng.integers(0, VOCAB, (20, 30)), np.zeros((20, 30), int)
    options = CooccurrenceSettings()
    whole = count_pairs(ids, document, LEXICON, options)
    parts = [count_pairs(ids[i : i + 3], document[i : i + 3], LEXICON, options) for i in range(0, 20, 3)]
    for order in (parts, parts[::-1]):
        for shards in (1, 2, 5):
            summed = merge([piece for part in order for piece in split(part, VOCAB, shards)])
            assert np.array_equal(summed.keys, whole.keys)
            assert np.array_equal(summed.counts, whole.counts)
            assert summed.units == whole.units


def test_large_vocabularies_use_wide_keys():
    big = Lexicon(100_000)
    got = count_pairs(np.array([[99_998, 99_999]]), np.zeros((1, 2), int), big, CooccurrenceSettings())
    assert got.keys.tolist() == [99_998 * 100_000 + 99_999]


def test_decay_rounds_down_and_drops_pairs():
    counts = count_pairs(np.array([[2, 3, 2, 3, 2, 5]]), np.zeros((1, 6), int), LEXICON, CooccurrenceSettings(window=1))
    assert counts.counts.tolist() == [4, 1]  # (2, 3) four times, (2, 5) once
    assert decayed(counts, 0.5).counts.tolist() == [2]


def test_what_is_refused():
    row = np.array([[1, 2, VOCAB]])
    with pytest.raises(CooccurrenceError, match="outside of the vocabulary of 11"):
        count_pairs(row, np.zeros_like(row), LEXICON, CooccurrenceSettings())
    with pytest.raises(CooccurrenceError, match="begins_word"):
        count_pairs(row, np.zeros_like(row), Lexicon(20), CooccurrenceSettings(unit="word"))
    with pytest.raises(ValueError, match="alpha must be above 0"):
        CooccurrenceSettings(alpha=0)
