"""A shard: adds a delta once, begins anew from its journal wherever it died, publishes the same snapshot when asked again."""

from __future__ import annotations

import numpy as np
import pytest

from actors.cooccurrence import CooccurrenceError, CooccurrenceSettings, Lexicon, PairCounts, count_pairs, merge
from actors.cooccurrence import shard as module
from actors.cooccurrence.prepass import count_rows
from actors.cooccurrence.service import LocalStore
from actors.cooccurrence.shard import CountShardCore

LEXICON = Lexicon(9)
SETTINGS = CooccurrenceSettings(window=3)


def delta(seed: int) -> PairCounts:
    ids = np.random.default_rng(seed).integers(0, 9, (4, 10))
    return count_pairs(ids, np.zeros_like(ids), LEXICON, SETTINGS)


def same(a: PairCounts, b: PairCounts) -> bool:
    return np.array_equal(a.keys, b.keys) and np.array_equal(a.counts, b.counts) and a.units == b.units


def test_a_delta_that_is_sent_twice_counts_once():
    shard = CountShardCore()
    assert shard.add("a", delta(0))
    assert not shard.add("a", delta(0))
    assert same(shard.counts(), delta(0))
    assert shard.missing(["a", "b"]) == ["b"]


@pytest.mark.parametrize("died_after", range(9))
def test_a_shard_made_anew_over_its_journal_goes_on(tmp_path, monkeypatch, died_after):
    monkeypatch.setattr(module, "COMPACT_AFTER", 3)
    shard = CountShardCore(tmp_path)
    for number in range(8):
        if number == died_after:
            shard = CountShardCore(tmp_path)
        shard.add(f"d{number}", delta(number))
    shard = CountShardCore(tmp_path)
    assert not shard.add("d7", delta(7))
    assert same(shard.counts(), merge([delta(number) for number in range(8)]))


def test_dying_between_the_base_and_the_removal_of_its_deltas_counts_none_twice(tmp_path, monkeypatch):
    shard = CountShardCore(tmp_path)
    shard.add("a", delta(0))
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("delta-*")}
    shard.counts()  # writes the base, removes the deltas
    for name, content in kept.items():
        (tmp_path / name).write_bytes(content)
    assert same(CountShardCore(tmp_path).counts(), delta(0))


def test_snapshots_are_numbered_and_repeatable(tmp_path):
    shard = CountShardCore(tmp_path)
    shard.add("1/0", delta(0))
    with pytest.raises(CooccurrenceError, match="waits for 1 deltas, such as 1/1"):
        shard.snapshot(1, ["1/0", "1/1"])
    shard.add("1/1", delta(1))
    first = shard.snapshot(1, ["1/0", "1/1"], decay=0.5)
    assert same(first, merge([delta(0), delta(1)]))
    again = CountShardCore(tmp_path)
    assert same(again.snapshot(1, ["1/0", "1/1"], decay=0.5), first)
    again.add("2/0", delta(2))
    second = again.snapshot(2, ["2/0"])
    halved = PairCounts(first.keys, first.counts // 2)
    alive = halved.counts > 0
    assert same(second, merge([PairCounts(halved.keys[alive], halved.counts[alive], first.units), delta(2)]))
    with pytest.raises(CooccurrenceError, match="Snapshot 1 is gone"):
        again.snapshot(1, [])


def test_dying_between_a_snapshot_and_its_base_decays_once(tmp_path, monkeypatch):
    shard = CountShardCore(tmp_path)
    shard.add("a", delta(0))
    shard.counts()
    base = (tmp_path / "base.npz").read_bytes()
    shard.snapshot(1, ["a"], decay=0.5)
    after = shard.counts()
    (tmp_path / "base.npz").write_bytes(base)  # as it was before the snapshot was followed by its base
    assert same(CountShardCore(tmp_path).counts(), after)


class Rows:
    def __init__(self):
        self.ids = np.random.default_rng(4).integers(0, 9, (50, 12))

    def __len__(self):
        return len(self.ids)

    def read(self, start, stop):
        return self.ids[start:stop], np.zeros((stop - start, 12), int)


def test_the_pre_pass_counts_every_row_once_for_any_number_of_shards():
    rows = Rows()
    expected = count_pairs(*rows.read(0, 50), LEXICON, SETTINGS)
    for shards, size in ((1, 50), (3, 7)):
        assert same(count_rows(rows, LEXICON, SETTINGS, LocalStore(9, shards), rows_per_task=size), expected)


def test_what_a_shard_lost_is_counted_again():
    store = LocalStore(9, 2)
    count_rows(Rows(), LEXICON, SETTINGS, store, rows_per_task=10)
    store.shards[1] = CountShardCore()  # died, and had no journal
    expected = count_pairs(*Rows().read(0, 50), LEXICON, SETTINGS)
    assert same(count_rows(Rows(), LEXICON, SETTINGS, store, rows_per_task=10), expected)
