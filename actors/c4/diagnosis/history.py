"""The recent blocks of every rank of a group and of every connection, and what the past says of the present.

A table of N series (a rank in a group, or a connection in a group) by W blocks. It is immutable: ``with_rows`` returns a new
one. Rows may come once, again, or late; what counts is their block number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RANK_BITS = 20
MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


def series_key(group: NDArray, first: NDArray, second: NDArray | None = None) -> NDArray[np.int64]:
    """One integer for (group, rank) or (group, source, destination); up to 2**20 ranks and 2**23 groups."""
    key = (group.astype(np.int64) << (2 * _RANK_BITS)) | (first.astype(np.int64) << _RANK_BITS)
    return key if second is None else key | second.astype(np.int64)


@dataclass(frozen=True)
class History:
    """N series, W blocks, V values a block."""

    keys: NDArray[np.int64]
    """[N], ascending."""
    newest: NDArray[np.int64]
    """[N]: number of the newest block."""
    block: NDArray[np.int32]
    """[N, W]: number of the block that lies in a place; -1 for none."""
    values: NDArray[np.float32]
    """[V, N, W]."""

    @property
    def group(self) -> NDArray[np.int64]:
        return self.keys >> (2 * _RANK_BITS)

    @property
    def first(self) -> NDArray[np.int64]:
        """Rank, or source of a connection."""
        return (self.keys >> _RANK_BITS) & ((1 << _RANK_BITS) - 1)

    @property
    def second(self) -> NDArray[np.int64]:
        """Destination of a connection."""
        return self.keys & ((1 << _RANK_BITS) - 1)

    def find(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places of ``keys``; -1 where there is none."""
        if not len(self.keys):
            return np.full(len(keys), -1, dtype=np.int64)
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[place] == keys, place, -1)

    def with_rows(
        self, keys: NDArray[np.int64], block: NDArray[np.int64], values: NDArray[np.float32]
    ) -> tuple[History, bool]:
        """This table with rows added ([B], [B], [V, B]), and whether any was new."""
        known = self
        place = known.find(keys)
        if (place < 0).any():
            known = known._with_series(np.unique(keys[place < 0]))
            place = known.find(keys)
        width = known.block.shape[1]
        column = block % width
        news = block > known.block[place, column]
        if not news.any():
            return known, False
        place, column, block, values = place[news], column[news], block[news], values[:, news]
        if not (np.diff(block) >= 0).all():
            order = np.argsort(block, kind="stable")  # of two rows for one place the newer block is to stay
            place, column, block, values = place[order], column[order], block[order], values[:, order]
        numbers, table, newest = known.block.copy(), known.values.copy(), known.newest.copy()
        numbers[place, column] = block
        table[:, place, column] = values
        np.maximum.at(newest, place, block)
        return History(known.keys, newest, numbers, table), True

    def by_age(
        self, value: int, label: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """([N, W], [N, W]): one of the values, and block numbers, the newest first; nan and -1 where a block is missing.

        With ``label`` [N] a column holds the same block of all series of one label (what is behind lacks the first columns).
        """
        width = self.block.shape[1]
        newest = self.newest
        if label is not None and len(newest):
            front = np.full(int(label.max()) + 1, -1, dtype=np.int64)
            np.maximum.at(front, label, newest)
            newest = front[label]
        wanted = (newest[:, None] - np.arange(width)).astype(np.int32)
        # One flat gather: several times as fast as take_along_axis.
        place = (wanted % width) + (np.arange(len(newest), dtype=np.int32) * width)[:, None]
        present = (self.block.ravel()[place] == wanted) & (wanted >= 0)
        values = np.where(present, self.values[value].ravel()[place], np.float32(np.nan))
        return values, np.where(present, wanted, np.int32(-1))

    def latest(self, value: int) -> NDArray[np.float32]:
        """[N]: one of the values in each series' newest block."""
        return self.values[value][np.arange(len(self.newest)), self.newest % self.block.shape[1]]

    def chosen(self, rows: NDArray[np.int64]) -> History:
        """Some of the series."""
        return History(self.keys[rows], self.newest[rows], self.block[rows], self.values[:, rows])

    def _with_series(self, keys: NDArray[np.int64]) -> History:
        merged = np.union1d(self.keys, keys)
        place = np.searchsorted(merged, self.keys)
        width = self.block.shape[1]
        newest = np.full(len(merged), -1, dtype=np.int64)
        block = np.full((len(merged), width), -1, dtype=np.int32)
        values = np.full((len(self.values), len(merged), width), np.nan, dtype=np.float32)
        newest[place], block[place], values[:, place] = self.newest, self.block, self.values
        return History(merged, newest, block, values)


def no_history(values: int, width: int) -> History:
    """A table without series."""
    return History(
        np.empty(0, np.int64),
        np.empty(0, np.int64),
        np.empty((0, width), np.int32),
        np.empty((values, 0, width), np.float32),
    )


def masked_median(values: NDArray, valid: NDArray[np.bool_]) -> NDArray:
    """Median of each row of [N, W] over its valid places; nan for a row without any."""
    count = valid.sum(axis=1)
    ordered = np.sort(np.where(valid, values, np.inf), axis=1)
    low = np.take_along_axis(ordered, np.maximum((count - 1) // 2, 0)[:, None], axis=1)[:, 0]
    high = np.take_along_axis(ordered, np.minimum(count // 2, values.shape[1] - 1)[:, None], axis=1)[:, 0]
    return np.where(count > 0, (low + high) / 2, np.nan)


def median_of_others(values: NDArray, label: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For each of [N] values the median of the others with its label (nan ones do not count), and how many those are."""
    result = np.full(len(values), np.nan)
    others = np.zeros(len(values), dtype=np.int64)
    chosen = np.flatnonzero(np.isfinite(values))
    if not len(chosen):
        return result, others
    order = chosen[np.lexsort((values[chosen], label[chosen]))]
    sorted_label, sorted_value = label[order], values[order].astype(np.float64)
    start = np.flatnonzero(np.r_[True, sorted_label[1:] != sorted_label[:-1]])
    size = np.diff(np.r_[start, len(order)])
    first, count = np.repeat(start, size), np.repeat(size, size)
    own = np.arange(len(order)) - first
    rest = count - 1

    def at(index: NDArray) -> NDArray:
        return sorted_value[first + np.minimum(index + (index >= own), np.maximum(count - 1, 0))]

    middle = (at(np.maximum((rest - 1) // 2, 0)) + at(rest // 2)) / 2
    result[order] = np.where(rest > 0, middle, np.nan)
    others[order] = rest
    return result, others


def basis_of_like(values: NDArray, label: NDArray[np.int64]) -> tuple[NDArray, NDArray[np.int64]]:
    """([N, W], [N]): what is usual among the series of a label, column by column; and how many those are.

    The lower median of all (so that a slow minority, or half of them, does not shift it); of two the other one; of one alone
    the median of its own columns. nan where less than half of them have told.
    """
    values = values.astype(np.float32)
    basis = np.full(values.shape, np.nan, dtype=np.float32)
    order = np.argsort(label, kind="stable")
    start = np.flatnonzero(np.r_[True, label[order][1:] != label[order][:-1]]) if len(order) else np.empty(0, np.int64)
    size = np.diff(np.r_[start, len(order)])
    members = np.zeros(len(label), dtype=np.int64)
    members[order] = np.repeat(size, size)
    for n in np.unique(size):
        rows = order[start[size == n][:, None] + np.arange(n)]
        if n == 1:
            mine = values[rows[:, 0]]
            basis[rows[:, 0]] = masked_median(mine, np.isfinite(mine))[:, None]
        elif n == 2:
            basis[rows] = values[rows[:, ::-1]]
        else:
            table = np.sort(np.where(np.isfinite(values[rows]), values[rows], np.inf), axis=1)
            count = np.isfinite(table).sum(axis=1, keepdims=True)
            usual = np.take_along_axis(table, np.maximum((count - 1) // 2, 0), axis=1)
            basis[rows] = np.where(2 * count >= n, usual, np.nan)
    return basis, members
