"""The writing end of a worker's ring: stamps of operations and connections in mapped shared memory, under a microsecond each.

A record is found by its id: operation ``op_id`` lies at slot ``op_id % capacity``. Its id is taken away first and written last,
so a reader that sees the same id before and after copying has a whole record. Stamps that follow are single aligned words.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import logging
import mmap
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic_ns
from typing import Any, Protocol

import numpy as np

from actors.c4.recorder.errors import RecorderError
from actors.c4.recorder.layout import (
    HEADER,
    HEADER_BYTES,
    MAGIC,
    RUN_BYTES,
    VERSION,
    Communicator,
    Sizes,
    make_directory,
    process_start,
    ring_path,
)
from actors.c4.recorder.records import EDGE_RECORD, OP_RECORD

logger = logging.getLogger("sextant.c4.recorder")

# Native byte order and sizes: such words are written whole, not byte by byte.
_OP_TAIL = struct.Struct("@qqqqqiiBBHI")
_EDGE_PAIR = struct.Struct("@qqqqqqqiiiiqqqqqqqiiii")
_OP_WORDS = OP_RECORD.itemsize // 8
_EDGE_WORDS = EDGE_RECORD.itemsize // 8
_HEARTBEAT, _NEWEST, _CLOSED, _TABLE_USED = (HEADER.fields[name][1] // 8  # type: ignore[index]
                                             for name in ("heartbeat_ns", "newest_op", "closed", "table_used"))  # fmt: skip
MAX_RECORDS = 1 << 20


class Enter(Protocol):
    """See ``RingWriter.enter``."""

    def __call__(
        self, communicator: int, sequence: int, op_type: int, element_type: int, payload: int, peer: int = -1,
        flags: int = 0, started: bool = False,
    ) -> int: ...  # fmt: skip


class End(Protocol):
    """See ``RingWriter.end``."""

    def __call__(self, op_id: int, flags: int = 0) -> None: ...


class OpenEdges(Protocol):
    """See ``RingWriter.open_edges``."""

    def __call__(
        self, op_id: int, sequence: int, communicator: int, predecessor: int, rank: int, successor: int
    ) -> tuple[EdgeSlot, EdgeSlot]: ...


class RingWriter:
    """One worker's ring. Any thread may write; every method is bounded and never blocks on a reader."""

    def __init__(
        self,
        path: Path | None,
        *,
        run: str,
        generation: int,
        rank: int,
        world_size: int,
        op_capacity: int = 4096,
        edge_capacity: int = 8192,
        table_capacity: int = 1 << 16,
    ):
        """Make the file whole under a temporary name, then give it its own: no reader sees half a header.

        Args:
            path: where; None keeps the records in private memory, so that nobody reads them.
            run, generation, rank, world_size: whose ring it is; ``rank`` is global.
            op_capacity, edge_capacity: records kept; powers of two.
            table_capacity: bytes for the communicators, a multiple of 8; one takes about 40 and 4 a rank.

        Raises:
            RecorderError: a capacity or name does not do, there is no room for the file, or the folder cannot be written.
        """
        for what, value in (("operations", op_capacity), ("edges", edge_capacity)):
            if not 2 <= value <= MAX_RECORDS or value & (value - 1):
                raise RecorderError(f"A ring keeps a power of two of {what} from 2 to {MAX_RECORDS:,}, not {value}.")
        if table_capacity < 1024 or table_capacity % 8:
            raise RecorderError(
                f"The table of communicators takes a multiple of 8 from 1,024 bytes, not {table_capacity}."
            )
        if len(run.encode()) > RUN_BYTES:
            raise RecorderError(f"The run's name is longer than {RUN_BYTES} bytes: {run!r}.")
        self.path = path
        self.sizes = Sizes(op_capacity, edge_capacity, table_capacity)
        self.pid = os.getpid()
        header = np.zeros(1, dtype=HEADER)
        fields: dict[str, Any] = {
            "magic": MAGIC, "version": VERSION, "header_bytes": HEADER_BYTES, "run": run.encode(),
            "hostname": socket.gethostname().encode()[:64], "generation": generation, "rank": rank, "world_size": world_size,
            "pid": self.pid, "process_start": process_start(self.pid), "op_capacity": op_capacity,
            "edge_capacity": edge_capacity, "table_capacity": table_capacity, "heartbeat_ns": monotonic_ns(),
        }  # fmt: skip
        for name, value in fields.items():
            header[name] = value
        self.map = _make_map(path, self.sizes.total, header.tobytes())
        words = memoryview(self.map).cast("q")
        self._header = words[: HEADER_BYTES // 8]
        self._ops = words[self.sizes.operations // 8 : self.sizes.edges // 8]
        self._edges = words[self.sizes.edges // 8 : self.sizes.total // 8]
        self._edge_ints = memoryview(self.map).cast("i")[self.sizes.edges // 4 : self.sizes.total // 4]
        self._op_mask = op_capacity - 1
        self._table_lock = threading.Lock()
        self._communicators: dict[str, int] = {}
        self._table_full = False
        self._bind()

    # ---- operations (closures over locals: half the time of attributes, and these run in every collective)

    def _bind(self) -> None:
        ops, header, mapped = self._ops, self._header, self.map
        mask, first = self.sizes.op_capacity - 1, self.sizes.operations
        next_id, pack, clock = itertools.count(1).__next__, _OP_TAIL.pack_into, monotonic_ns

        def enter(
            communicator: int,
            sequence: int,
            op_type: int,
            element_type: int,
            payload: int,
            peer: int = -1,
            flags: int = 0,
            started: bool = False,
        ) -> int:
            op_id = next_id()
            slot = (op_id & mask) << 3
            now = clock()
            ops[slot] = 0
            pack(
                mapped, first + (slot << 3) + 8,
                sequence, payload, now, now if started else 0, 0, communicator, peer, op_type, element_type, flags, 0,
            )  # fmt: skip
            ops[slot] = header[_NEWEST] = op_id
            return op_id

        def end(op_id: int, flags: int = 0) -> None:
            slot = (op_id & mask) << 3
            if ops[slot] == op_id and not ops[slot + 5]:
                if flags:
                    ops[slot + 7] |= flags << 16
                ops[slot + 5] = clock()

        def start(op_id: int) -> None:
            slot = (op_id & mask) << 3
            if ops[slot] == op_id and not ops[slot + 4]:
                ops[slot + 4] = clock()

        edges, ints, first_edge = self._edges, self._edge_ints, self.sizes.edges
        next_pair, pair_mask, pack_pair = (
            itertools.count(0).__next__,
            self.sizes.edge_capacity // 2 - 1,
            _EDGE_PAIR.pack_into,
        )
        pair_words = 2 * _EDGE_WORDS
        made: list[tuple[EdgeSlot, EdgeSlot] | None] = [None] * (pair_mask + 1)  # a slot's place never changes

        def open_edges(
            op_id: int, sequence: int, communicator: int, predecessor: int, rank: int, successor: int
        ) -> tuple[EdgeSlot, EdgeSlot]:
            number = next_pair() & pair_mask
            slot = number * pair_words
            other = slot + _EDGE_WORDS
            now = clock()
            edges[slot] = edges[other] = 0
            pack_pair(
                edges, slot << 3,
                0, sequence, 0, 0, 0, 0, now, communicator, rank, successor, 0,
                0, sequence, 0, 0, 0, 0, now, communicator, predecessor, rank, 0,
            )  # fmt: skip
            edges[slot] = edges[other] = op_id
            pair = made[number]
            if pair is None:
                ends = [EdgeSlot(edges, ints, at, first_edge + (at << 3)) for at in (slot, other)]
                pair = made[number] = ends[0], ends[1]
            return pair

        self.start: Callable[[int], None] = start
        """Its transfer began: ``start(op_id)``."""
        self.open_edges: OpenEdges = open_edges
        """``open_edges(op_id, sequence, communicator, predecessor, rank, successor)``: slots of this rank's ends of both its
        connections in one operation, (outgoing, incoming)."""
        self.enter: Enter = enter
        """An operation was called: ``enter(communicator, sequence, op_type, element_type, payload, peer=-1, flags=0,
        started=False)`` returns its id. ``communicator``: index from ``add_communicator``; ``sequence``: running number in it,
        from 1; ``payload``: bytes at this rank; ``peer``: global rank of the root or partner; ``flags``: bits of ``OpFlag``;
        ``started``: the transfer begins with the call."""
        self.end: End = end
        """``end(op_id, flags=0)``: it ended, with further bits of ``OpFlag``; nothing when it has ended or was overwritten."""

    def stamp(self, op_id: int, start_ns: int, end_ns: int) -> None:
        """Start and end as measured elsewhere (CUDA events), CLOCK_MONOTONIC."""
        slot = (op_id & self._op_mask) * _OP_WORDS
        if self._ops[slot] == op_id:
            self._ops[slot + 4] = start_ns
            self._ops[slot + 5] = end_ns

    # ---- header and table

    @property
    def address(self) -> int:
        """Of the mapping, for compiled code; valid while this object lives."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def add_communicator(self, communicator: Communicator) -> int:
        """Its index, the same for the same name; -1 when the table is full (its operations are recorded under -1)."""
        with self._table_lock:
            known = self._communicators.get(communicator.name)
            if known is not None:
                return known
            line = json.dumps([communicator.name, communicator.role, list(communicator.ranks)], separators=(",", ":"))
            text = line.encode() + b"\n"
            used = self._header[_TABLE_USED]
            if used + len(text) > self.sizes.table_capacity:
                if not self._table_full:
                    logger.warning("The ring's table of communicators is full; %s and later ones have no name there.",
                                   communicator.name)  # fmt: skip
                self._table_full = True
                return -1
            at = self.sizes.table + used
            self.map[at : at + len(text)] = text
            self._header[_TABLE_USED] = used + len(text)
            index = self._communicators[communicator.name] = len(self._communicators)
            return index

    def beat(self) -> None:
        """The heartbeat: this process still runs Python."""
        self._header[_HEARTBEAT] = monotonic_ns()

    def close(self) -> None:
        """An orderly end: what is read from now on will not change. The file stays for the reader; its mapping too."""
        if not self._header[_CLOSED]:
            self._header[_CLOSED] = monotonic_ns()


class EdgeSlot:
    """One end of one connection in one operation, updated in place."""

    __slots__ = ("_ints", "_slot", "_words", "offset")

    def __init__(self, words: memoryview, ints: memoryview, slot: int, offset: int):
        self._words, self._ints, self._slot = words, ints, slot
        self.offset = offset
        """Of the record in the mapped file, in bytes."""

    def late(self, lateness_ns: int) -> None:
        """The predecessor announced the operation so long after this rank had begun it."""
        self._words[self._slot + 3] = lateness_ns
        self._words[self._slot + 6] = monotonic_ns()

    def moved(self, count: int, now_ns: int) -> None:
        """``count`` more bytes moved."""
        self._words[self._slot + 2] += count
        self._words[self._slot + 6] = now_ns

    def received(self, wait_ns: int, transfer_ns: int) -> None:
        """One more message came whole."""
        self._words[self._slot + 4] += wait_ns
        self._words[self._slot + 5] += transfer_ns
        self._ints[self._slot * 2 + 17] += 1

    def begun(self) -> None:
        """One more message begun to be sent."""
        self._ints[self._slot * 2 + 17] += 1


def new_ring(directory: Path, run: str, generation: int, rank: int, world_size: int, **capacities: int) -> RingWriter:
    """This process's ring in ``directory``. Raises RecorderError as ``RingWriter``, or when the folder cannot be used."""
    make_directory(directory)
    path = ring_path(directory, run, generation, rank, os.getpid())
    return RingWriter(path, run=run, generation=generation, rank=rank, world_size=world_size, **capacities)


def _make_map(path: Path | None, size: int, header: bytes) -> mmap.mmap:
    if path is None:
        private = mmap.mmap(-1, size)
        private[: len(header)] = header
        return private
    temporary = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            # Every page is claimed now: a full memory is an error here, not a SIGBUS in the middle of training.
            os.posix_fallocate(handle, 0, size)
            mapped = mmap.mmap(handle, size)
        finally:
            os.close(handle)
        mapped[: len(header)] = header
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise RecorderError(f"No ring of {size:,} bytes can be made at {path}: {error.strerror}.") from error
    return mapped
