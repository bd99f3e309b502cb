"""The shards as Ray actors, and the two stores that counting talks to: in this process (``LocalStore``) or on the cluster."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray

from actors.cluster.metrics import counter
from actors.cooccurrence.count import PairCounts, merge, split
from actors.cooccurrence.shard import CountShardCore

logger = logging.getLogger(__name__)

DELTAS = counter("mcmisp", "cooccurrence_deltas", "events", help="Deltas that a shard has added.", tags=["shard"])


class Store(Protocol):
    """Where counts go. All methods may be called again after a failure."""

    def add(self, name: str, delta: PairCounts) -> None:
        """Adds a delta once, whatever happens on the way."""
        ...

    def missing(self, names: Sequence[str]) -> list[str]:
        """Names that some shard does not have (it died without a journal): their deltas must be sent again."""
        ...

    def counts(self) -> PairCounts:
        """The sum of everything."""
        ...

    def snapshot(self, number: int, names: Sequence[str], decay: float = 1.0) -> PairCounts:
        """The sum at the numbered snapshot, see ``CountShardCore.snapshot``."""
        ...


class LocalStore:
    """Shards in this process; ``folder`` as for ``CountShardCore``."""

    def __init__(self, vocab_size: int, shards: int = 1, folder: Path | None = None):
        self._vocab_size = vocab_size
        self.shards = [CountShardCore(None if folder is None else folder / f"shard-{i}") for i in range(shards)]

    def add(self, name: str, delta: PairCounts) -> None:
        for shard, part in zip(self.shards, split(delta, self._vocab_size, len(self.shards)), strict=True):
            shard.add(name, part)

    def missing(self, names: Sequence[str]) -> list[str]:
        return sorted({name for shard in self.shards for name in shard.missing(list(names))})

    def counts(self) -> PairCounts:
        return merge([shard.counts() for shard in self.shards])

    def snapshot(self, number: int, names: Sequence[str], decay: float = 1.0) -> PairCounts:
        return merge([shard.snapshot(number, list(names), decay) for shard in self.shards])


class CountShard:
    """The actor around a shard. Arrays arrive and leave as numpy arrays, without a copy where the object store allows."""

    def __init__(self, index: int, folder: str | None):
        self._index = index
        self._core = CountShardCore(None if folder is None else Path(folder))

    def add(self, name: str, keys: np.ndarray, counts: np.ndarray, units: int) -> bool:
        new = self._core.add(name, PairCounts(np.array(keys), np.array(counts), units))
        if new:
            DELTAS.increase(1, shard=str(self._index))
        return new

    def missing(self, names: list[str]) -> list[str]:
        return self._core.missing(names)

    def counts(self) -> PairCounts:
        return self._core.counts()

    def snapshot(self, number: int, names: list[str], decay: float) -> PairCounts:
        return self._core.snapshot(number, names, decay)


class ShardedStore:
    """Shards as Ray actors. Picklable: workers get it and send their deltas themselves.

    An actor that dies is started again by Ray, and its calls are sent again: deltas have names, so none is counted twice. With
    ``folder`` (on a disk that every node sees, or with one node) it begins from its journal; without, ``missing`` says what it
    has lost.
    """

    def __init__(self, vocab_size: int, actors: Sequence[Any]):
        self._vocab_size, self.actors = vocab_size, list(actors)

    @classmethod
    def start(cls, vocab_size: int, shards: int, folder: Path | None = None, num_cpus: float = 0.1) -> ShardedStore:
        """Starts the actors; ``close`` ends them."""
        remote = ray.remote(CountShard).options(num_cpus=num_cpus, max_restarts=-1, max_task_retries=-1)
        folders = [None if folder is None else str(folder.absolute() / f"shard-{index}") for index in range(shards)]
        return cls(vocab_size, [remote.remote(index, one) for index, one in enumerate(folders)])

    def add(self, name: str, delta: PairCounts) -> None:
        parts = split(delta, self._vocab_size, len(self.actors))
        ray.get([a.add.remote(name, p.keys, p.counts, p.units) for a, p in zip(self.actors, parts, strict=True)])

    def missing(self, names: Sequence[str]) -> list[str]:
        found = ray.get([actor.missing.remote(list(names)) for actor in self.actors])
        return sorted({name for part in found for name in part})

    def counts(self) -> PairCounts:
        return merge(ray.get([actor.counts.remote() for actor in self.actors]))

    def snapshot(self, number: int, names: Sequence[str], decay: float = 1.0) -> PairCounts:
        return merge(ray.get([actor.snapshot.remote(number, list(names), decay) for actor in self.actors]))

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


__all__ = ["CountShard", "LocalStore", "ShardedStore", "Store"]
