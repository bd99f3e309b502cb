"""The shards on Ray: the same table for any number of workers and shards, also when a shard is killed in between."""

from __future__ import annotations

import numpy as np
import pytest
import ray

from actors.cooccurrence import CooccurrenceSettings, Lexicon, build_table, count_pairs
from actors.cooccurrence.prepass import count_rows
from actors.cooccurrence.service import ShardedStore

pytestmark = pytest.mark.cluster

LEXICON = Lexicon(50)
SETTINGS = CooccurrenceSettings(window=4)


class Rows:
    def __init__(self):
        self.ids = np.random.default_rng(4).integers(0, 50, (60, 16))

    def __len__(self):
        return len(self.ids)

    def read(self, start, stop):
        return self.ids[start:stop], np.zeros((stop - start, 16), int)


@pytest.mark.parametrize("workers,shards,journal", [(2, 3, False), (4, 2, True)])
def test_any_number_of_workers_makes_the_same_table_though_a_shard_dies(ray_local, tmp_path, workers, shards, journal):
    expected = build_table(count_pairs(*Rows().read(0, 60), LEXICON, SETTINGS), LEXICON, SETTINGS)
    store = ShardedStore.start(50, shards, tmp_path if journal else None)
    killed = []

    def told(done: int, total: int) -> None:
        if done == 2 and not killed:
            killed.append(ray.kill(store.actors[0], no_restart=False))

    try:
        counts = count_rows(Rows(), LEXICON, SETTINGS, store, rows_per_task=10, workers=workers, told=told)
    finally:
        store.close()
    assert killed
    table = build_table(counts, LEXICON, SETTINGS)
    assert table.version == expected.version
    assert np.array_equal(table.dense, expected.dense)
