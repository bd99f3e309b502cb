"""Batches of a training by step: from files here, or streamed by Ray Data (``get_dataset_shard``); the same rows either way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from apps.mcmisp.data.order import RowOrder
from apps.mcmisp.data.shards import PackedRows, columns_to_rows
from apps.program.errors import UserError
from apps.training.position import share_of


@dataclass(frozen=True)
class Batch:
    """ids_BS and document_BS int64; ``row_B``: numbers of the rows in the corpus."""

    ids_BS: torch.Tensor
    document_BS: torch.Tensor
    row_B: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(t.to(device, non_blocking=True) for t in (self.ids_BS, self.document_BS, self.row_B)))


class Feed(Protocol):
    """``batch(step)``: this worker's part of the step's rows. Steps are asked for in ascending order, from any one on."""

    waited_s: float
    """Time that ``batch`` took in all."""

    def batch(self, step: int) -> Batch: ...


class _FileWindows:
    def __init__(self, rows: PackedRows, order: RowOrder):
        self._rows, self._order = rows, order

    def window(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        first = number * self._order.window
        return self._rows.read(first, min(first + self._order.window, self._order.rows))


class _StreamWindows:
    """Windows as they come from Ray Data; an epoch is one pass. Resuming passes over the windows before without using them."""

    def __init__(self, shard: Any, order: RowOrder, size: int):
        self._shard, self._order, self._size = shard, order, size
        self._epoch, self._next = -1, 0
        self._stream: Iterator[Any] = iter(())

    def window(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch != self._epoch or number < self._next:
            self._epoch, self._next = epoch, 0
            batches = self._shard.iter_batches(
                batch_size=self._order.window, batch_format="pyarrow", prefetch_batches=1
            )
            self._stream = iter(batches)
        while True:
            table = next(self._stream, None)
            if table is None:
                raise UserError(
                    "The stream of rows ended before its last row: the prepared corpus has changed. Prepare it anew."
                )
            current, self._next = self._next, self._next + 1
            if current == number:
                break
        found = table.column("row").to_numpy()
        first = number * self._order.window
        if (
            len(found) != min(self._order.window, self._order.rows - first)
            or found[0] != first
            or found[-1] != first + len(found) - 1
        ):
            raise UserError(
                f"Rows {found[0]} to {found[-1]} came where {first} and following were due: the order was not kept."
            )
        return columns_to_rows(table, self._size)


class _Feed:
    """Deals the rows of windows to this worker."""

    def __init__(self, windows: _FileWindows | _StreamWindows, order: RowOrder, rank: int, world_size: int):
        self._windows, self._order, self._rank, self._world = windows, order, rank, world_size
        self._held: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self.waited_s = 0.0

    def batch(self, step: int) -> Batch:
        began = time.perf_counter()
        order = self._order
        share = share_of(order.batch, self._world)
        epoch, start = order.place(step)
        # All workers open the windows of the whole batch, so that streams advance alike.
        windows = range(start // order.window, -(-(start + order.batch) // order.window))
        first = start + self._rank * share
        ids, documents, rows = [], [], []
        for number in windows:
            held_ids, held_document = self._window(epoch, number)
            base = number * order.window
            place = order.window_order(epoch, number)[max(0, first - base) : max(0, first + share - base)]
            inside = (place - base).numpy()
            ids.append(held_ids[inside])
            documents.append(held_document[inside])
            rows.append(place)
        batch = Batch(
            torch.from_numpy(np.concatenate(ids).astype(np.int64)),
            torch.from_numpy(np.concatenate(documents).astype(np.int64)),
            torch.cat(rows),
        )
        self.waited_s += time.perf_counter() - began
        return batch

    def _window(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        key = (epoch, number)
        if key not in self._held:
            self._held = {k: v for k, v in self._held.items() if k == (epoch, number - 1)}
            self._held[key] = self._windows.window(epoch, number)
        return self._held[key]


def local_feed(rows: PackedRows, order: RowOrder, rank: int = 0, world_size: int = 1) -> Feed:
    """From the prepared files."""
    return _Feed(_FileWindows(rows, order), order, rank, world_size)


def streaming_feed(shard: Any, order: RowOrder, row_tokens: int, rank: int, world_size: int) -> Feed:
    """From ``ray.train.get_dataset_shard``: all rows in order (``unsplit_data_config``), of which this worker takes its own."""
    return _Feed(_StreamWindows(shard, order, row_tokens), order, rank, world_size)


def ray_dataset(rows: PackedRows) -> Any:
    """The prepared rows as a Ray Data set in their order."""
    import ray.data

    return ray.data.read_parquet([str(path) for path in rows.files], file_extensions=None)


def unsplit_data_config() -> Any:
    """Every worker sees all rows in order and takes its own: which rows are whose then follows from the step alone."""
    import ray.data
    import ray.train

    options = ray.data.ExecutionOptions(preserve_order=True)
    return ray.train.DataConfig(datasets_to_split=[], execution_options=options)


__all__ = ["Batch", "Feed", "local_feed", "ray_dataset", "streaming_feed", "unsplit_data_config"]
