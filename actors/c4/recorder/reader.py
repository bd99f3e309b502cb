"""The reading end of a worker's ring: whole records of another process, whatever state it is in. No torch, no Ray.

The mapping is read-only; the worker takes no part. A record that changes under the copy is left out and comes at the next read.
"""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.c4.recorder.errors import RingFormatError
from actors.c4.recorder.layout import (
    HEADER,
    HEADER_BYTES,
    MAGIC,
    VERSION,
    Communicator,
    RingName,
    Sizes,
    default_directory,
    file_run,
    parse_name,
    process_start,
)
from actors.c4.recorder.records import EDGE_RECORD, OP_RECORD


@dataclass(frozen=True)
class RingIdentity:
    """Whose ring it is."""

    run: str
    generation: int
    rank: int
    """Global rank."""
    world_size: int
    pid: int
    process_start: int
    """Clock ticks since boot."""
    hostname: str

    def alive(self) -> bool:
        """Whether that very process still exists (stopped counts, a zombie does not)."""
        return process_start(self.pid) == self.process_start != 0


@dataclass(frozen=True)
class RingSnapshot:
    """What a ring held at one moment."""

    at_ns: int
    """CLOCK_MONOTONIC of the read; one clock for all processes of a host."""
    heartbeat_ns: int
    closed_ns: int
    """0 while the worker records."""
    newest_op: int
    """Highest op_id entered so far."""
    communicators: tuple[Communicator, ...]
    """``communicator`` of a record is an index here (-1: the table was full)."""
    operations: NDArray[Any]
    """OP_RECORDs, ascending by op_id."""
    edges: NDArray[Any]
    """EDGE_RECORDs, ascending by op_id."""
    missed: int
    """Operations newer than ``after`` that were overwritten (or being written) before they could be read."""

    @property
    def heartbeat_age_s(self) -> float:
        return (self.at_ns - self.heartbeat_ns) / 1e9

    @property
    def open_operations(self) -> NDArray[Any]:
        """Those that have no end yet."""
        return self.operations[self.operations["end_ns"] == 0]


class RingReader:
    """A mapped ring of one worker. Close it, or use it in a with-statement."""

    def __init__(self, path: Path):
        """Map it.

        Raises:
            RingFormatError: the file is no ring, is truncated, or has another layout version.
            OSError: it cannot be opened.
        """
        self.path = path
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < HEADER_BYTES:
                raise RingFormatError(
                    f"{path} is no ring of records: it has {size} bytes, a header alone has {HEADER_BYTES}."
                )
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            header = np.frombuffer(self._map, dtype=HEADER, count=1)[0]
            if header["magic"] != MAGIC:
                raise RingFormatError(f"{path} is no ring of records.")
            if header["version"] != VERSION:
                raise RingFormatError(
                    f"{path} has layout version {header['version']}, this program reads {VERSION}: "
                    "worker and reader must run the same release."
                )
            self._sizes = Sizes(*(int(header[name]) for name in ("op_capacity", "edge_capacity", "table_capacity")))
            if min(self._sizes.op_capacity, self._sizes.edge_capacity, self._sizes.table_capacity) < 1:
                raise RingFormatError(f"{path} is no ring of records: its sizes make no sense.")
            if size < self._sizes.total:
                raise RingFormatError(f"{path} is truncated: {size} of {self._sizes.total} bytes are there.")
            self.identity = RingIdentity(
                header["run"].decode(errors="replace"), int(header["generation"]), int(header["rank"]),
                int(header["world_size"]), int(header["pid"]), int(header["process_start"]),
                header["hostname"].decode(errors="replace"),
            )  # fmt: skip
        except RingFormatError:
            del header
            self._map.close()
            raise
        self._header = np.frombuffer(self._map, dtype=HEADER, count=1)
        self._operations = self._part(OP_RECORD, self._sizes.operations, self._sizes.op_capacity)
        self._edges = self._part(EDGE_RECORD, self._sizes.edges, self._sizes.edge_capacity)
        self._table_used = 0
        self._communicators: tuple[Communicator, ...] = ()

    def read(self, after: int = 0) -> RingSnapshot:
        """Everything that can be read now.

        Args:
            after: operations up to this op_id are left out unless they are open; their edges too.
        """
        self._read_table()
        operations = _whole_records(self._operations)
        edges = _whole_records(self._edges)
        # The table once more: an operation may belong to a communicator that came meanwhile.
        self._read_table()
        header = self._header[0]
        newest = max(int(header["newest_op"]), int(operations["op_id"].max(initial=0)))
        fresh = operations["op_id"] > after
        missed = max(0, newest - after) - int(fresh.sum())
        kept = operations[fresh | (operations["end_ns"] == 0)]
        if after:
            edges = edges[(edges["op_id"] > after) | np.isin(edges["op_id"], kept["op_id"])]
        return RingSnapshot(
            at_ns=time.monotonic_ns(),
            heartbeat_ns=int(header["heartbeat_ns"]),
            closed_ns=int(header["closed"]),
            newest_op=newest,
            communicators=self._communicators,
            operations=kept[np.argsort(kept["op_id"], kind="stable")],
            edges=edges[np.argsort(edges["op_id"], kind="stable")],
            missed=max(0, missed),
        )

    def heartbeat_age_s(self) -> float:
        """Since the worker's heartbeat thread last ran."""
        return (time.monotonic_ns() - int(self._header[0]["heartbeat_ns"])) / 1e9

    def close(self) -> None:
        """Unmap."""
        del self._header, self._operations, self._edges
        self._map.close()

    def __enter__(self) -> RingReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _part(self, dtype: np.dtype[Any], offset: int, count: int) -> NDArray[Any]:
        return np.frombuffer(self._map, dtype=dtype, count=count, offset=offset)

    def _read_table(self) -> None:
        used = int(self._header[0]["table_used"])
        if used == self._table_used:
            return
        start = self._sizes.table
        text = bytes(self._map[start + self._table_used : start + used])
        added = tuple(
            Communicator(name, role, tuple(ranks)) for name, role, ranks in map(json.loads, text.splitlines())
        )
        self._communicators, self._table_used = self._communicators + added, used


def discover(directory: Path | None = None, *, run: str | None = None, generation: int | None = None) -> list[RingName]:
    """Rings in the folder by their names, of all runs and generations or of one; dead processes' too."""
    return [
        found
        for found in _names(directory or default_directory())
        if (run is None or found.run == file_run(run)) and (generation is None or found.generation == generation)
    ]


def _names(directory: Path) -> Iterator[RingName]:
    try:
        paths = sorted(directory.iterdir())
    except FileNotFoundError:
        return
    for path in paths:
        found = parse_name(path)
        if found is not None:
            yield found


def _whole_records(records: NDArray[Any]) -> NDArray[Any]:
    """A copy of those that were written whole and did not change hands meanwhile."""
    before = records["op_id"].copy()
    copied = records.copy()
    after = records["op_id"].copy()
    return copied[(before != 0) & (before == copied["op_id"]) & (before == after)]
