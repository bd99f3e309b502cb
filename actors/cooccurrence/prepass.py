"""The pre-pass: counts all rows of a data set, in this process or by Ray Data tasks that send their counts to the shards."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from actors.cooccurrence.count import PairCounts, count_pairs
from actors.cooccurrence.errors import CooccurrenceError
from actors.cooccurrence.service import Store
from actors.cooccurrence.settings import CooccurrenceSettings, Lexicon

logger = logging.getLogger(__name__)

ROWS_PER_TASK = 4096
ROUNDS = 5


class RowSource(Protocol):
    """Packed rows that any worker can read; picklable."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """ids and document numbers [stop - start, size]."""
        ...


def count_rows(
    source: RowSource,
    lexicon: Lexicon,
    settings: CooccurrenceSettings,
    store: Store,
    *,
    rows_per_task: int = ROWS_PER_TASK,
    workers: int | None = None,
    told: Callable[[int, int], None] | None = None,
) -> PairCounts:
    """Counts every row once, and returns the sum.

    Args:
        store: where the counts go; a ``ShardedStore`` when ``workers`` is given.
        workers: Ray Data tasks at a time; None counts here.
        told: called with tasks done and tasks in all.

    Raises:
        CooccurrenceError: a row does not fit the vocabulary, or shards die faster than they can be filled.
    """
    lexicon.check(settings)
    starts = list(range(0, len(source), rows_per_task))
    names = {_name(start): start for start in starts}
    for _ in range(ROUNDS):
        left = store.missing(list(names))
        if not left:
            return store.counts()
        if len(left) < len(names):
            logger.info("%d of %d tasks are to be counted (again)", len(left), len(names))
        task = _Task(source, lexicon, settings, store, rows_per_task)
        todo = [names[name] for name in left]
        if workers is None:
            for done, start in enumerate(todo, start=1):
                task.count(start)
                if told is not None:
                    told(done, len(todo))
        else:
            _run_on_ray_data(task, todo, workers, told)
    raise CooccurrenceError(f"After {ROUNDS} rounds shards still lack counts: they keep dying. See their logs.")


def _name(start: int) -> str:
    return f"rows-{start}"


class _Task:
    """Counts the rows from one start and sends them. Does the same whenever and wherever it is run again."""

    def __init__(self, source: RowSource, lexicon: Lexicon, settings: CooccurrenceSettings, store: Store, rows: int):
        self.source, self.lexicon, self.settings, self.store, self.rows = source, lexicon, settings, store, rows

    def count(self, start: int) -> int:
        ids, document = self.source.read(start, min(start + self.rows, len(self.source)))
        counts = count_pairs(ids, document, self.lexicon, self.settings)
        self.store.add(_name(start), counts)
        return counts.units

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"tokens": np.array([self.count(int(start)) for start in batch["item"]], dtype=np.int64)}


def _run_on_ray_data(task: _Task, starts: list[int], workers: int, told: Any) -> None:
    import ray.data
    from ray.data import TaskPoolStrategy

    ray.data.DataContext.get_current().enable_progress_bars = False
    # A block for each task: Ray Data schedules and, when a node dies, repeats blocks.
    rows = ray.data.from_items(starts, override_num_blocks=len(starts))
    counted = rows.map_batches(task.__call__, batch_size=1, compute=TaskPoolStrategy(size=workers), num_cpus=1)
    for done, _ in enumerate(counted.iter_batches(batch_size=1, prefetch_batches=0), start=1):
        if told is not None:
            told(done, len(starts))


__all__ = ["ROWS_PER_TASK", "RowSource", "count_rows"]
