"""Which piece of a tensor travels which way round the ring: all ring collectives are one pattern. No torch, no Ray.

A piece starts at rank ``start``; over the first ``accumulate`` hops each receiver adds its own values to it, over the further
hops it is carried as it is, and each receiver keeps it. Pieces follow one another without waiting (pipelining).

    ordered all-reduce    start 0, n-1 accumulating hops (so rank order 0, 1, .., n-1 for every element), n-1 carrying hops
    rotated all-reduce    chunk c: start c, n-1 accumulating, n-1 carrying (the classic ring, Patarasuk and Yuan 2009)
    reduce-scatter        chunk c: start c+1, n-1 accumulating, ends at rank c
    all-gather            chunk c: start c, n-1 carrying
    broadcast             start root, n-1 carrying

Both all-reduces move 2 (n-1) payloads over all connections together. The rotated one spreads them evenly, but adds an element in
an order that depends on where in the tensor it lies, so that another bucket layout gives other bits; the ordered one does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.c4.recorder.records import OpType

PIECE = np.dtype(
    [
        ("offset", "<i8"),
        ("length", "<i8"),
        ("start", "<i4"),
        ("accumulate", "<i4"),
        ("hops", "<i4"),
        ("reserved", "<i4"),
    ]
)
"""A piece: bytes in the buffer, the ring rank it starts at, accumulating hops, all hops."""


class Piece(NamedTuple):
    """A row of ``PIECE``."""

    offset: int
    length: int
    start: int
    accumulate: int
    hops: int


@dataclass(frozen=True)
class Plan:
    """An operation's pieces in the order in which they are sent, the same at all ranks."""

    pieces: NDArray[Any]
    """PIECEs."""
    rows: tuple[Piece, ...]
    """The same for Python."""
    receives: int
    """Messages that come to this rank."""
    sends: int
    """Messages that leave this rank."""


@lru_cache(maxsize=256)
def make_plan(
    op: OpType, payload: int, itemsize: int, rank: int, size: int, *, root: int = 0, piece_bytes: int = 1 << 19,
    rotated: bool = False,
) -> Plan:  # fmt: skip
    """The plan of one operation at ring rank ``rank`` of ``size``.

    Args:
        op: ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER or BROADCAST.
        payload: bytes of the whole buffer (of all chunks).
        itemsize: bytes of an element; no piece ends within one.
        root: ring rank of the root of a broadcast.
        piece_bytes: length of a piece, at most.
        rotated: the classic all-reduce.

    Raises:
        ValueError: another operation, or chunks that are not equal where they must be.
    """
    step = max(itemsize, piece_bytes // itemsize * itemsize)
    if op in (OpType.REDUCE_SCATTER, OpType.ALL_GATHER) and payload % (size * itemsize):
        raise ValueError(f"A payload of {payload} bytes has no {size} equal chunks of elements of {itemsize} bytes.")
    around = size - 1
    if op is OpType.ALL_REDUCE and not rotated:
        travels = [(0, payload, 0, around, 2 * around)]
    elif op is OpType.ALL_REDUCE:
        travels = [(a, b, chunk, around, 2 * around) for chunk, (a, b) in enumerate(_chunks(payload, itemsize, size))]
    elif op is OpType.REDUCE_SCATTER:
        bounds = enumerate(_chunks(payload, itemsize, size))
        travels = [(a, b, (chunk + 1) % size, around, around) for chunk, (a, b) in bounds]
    elif op is OpType.ALL_GATHER:
        travels = [(a, b, chunk, 0, around) for chunk, (a, b) in enumerate(_chunks(payload, itemsize, size))]
    elif op is OpType.BROADCAST:
        travels = [(0, payload, root, 0, around)]
    else:
        raise ValueError(f"There is no ring plan of {op.name}.")
    # Piece by piece of each travel in turn, so that no rank waits for a whole chunk.
    longest = max((b - a for a, b, *_ in travels), default=0)
    rows = [
        Piece(a + at, min(step, b - a - at), start, accumulate, hops)
        for at in range(0, longest, step)
        for a, b, start, accumulate, hops in travels
        if a + at < b
    ]
    pieces = np.array([(*row, 0) for row in rows], dtype=PIECE)
    receives = sum(1 for piece in rows for _ in arrivals(piece.start, piece.hops, rank, size))
    sends = sum(1 for piece in rows for _ in departures(piece.start, piece.hops, rank, size))
    return Plan(pieces, tuple(rows), receives, sends)


def arrivals(start: int, hops: int, rank: int, size: int) -> Iterator[int]:
    """Numbers of the hops (from 1) by which a piece comes to ``rank``."""
    first = (rank - start) % size or size
    return iter(range(first, hops + 1, size))


def departures(start: int, hops: int, rank: int, size: int) -> Iterator[int]:
    """Numbers of the hops by which a piece leaves ``rank``."""
    first = (rank - start) % size + 1
    return iter(range(first, hops + 1, size))


def _chunks(payload: int, itemsize: int, size: int) -> list[tuple[int, int]]:
    items = payload // itemsize
    bounds = [items * chunk // size * itemsize for chunk in range(size + 1)]
    return list(itertools.pairwise(bounds))
