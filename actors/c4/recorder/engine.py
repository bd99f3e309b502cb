"""Runs one ring operation in Python: the portable form, and the reference of the compiled one (csrc/ring.cpp). No Ray.

One thread moves both directions on non-blocking sockets, so that nothing waits for a lock, and every byte has left before the
operation ends. Stamps: lateness (own start until the predecessor's announcement), per message the wait for its first byte and
the transfer from first to last byte, without the time for which this rank was adding.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any

from actors.c4.recorder.failing import WITNESS_S, Failure
from actors.c4.recorder.plan import Plan
from actors.c4.recorder.ring import EdgeSlot
from actors.c4.recorder.transport import RingTransport
from actors.c4.recorder.wire import ABORT, ABORT_BYTES, ANNOUNCE, ANNOUNCEMENT, FRAME, PIECE, Announcement

_STALL_POLL_MS = 20
_SLICE_BYTES = 1 << 20


@dataclass(frozen=True)
class Job:
    """One operation as the engine runs it."""

    announcement: Announcement
    plan: Plan
    data: memoryview
    """Bytes of the buffer that the pieces lie in; the result is there in the end."""
    add: Callable[[int, int, bytearray], None]
    """``add(offset, length, scratch)``: data[offset:offset+length] becomes scratch + itself, elementwise."""
    average: bool
    divide: Callable[[int, int], None]
    """``divide(offset, length)``: a piece that has been added up at this rank becomes an average."""
    owner: Any
    """The tensor whose memory ``data`` is."""

    @property
    def address(self) -> int:
        """Of ``data``."""
        return int(self.owner.data_ptr())


class PythonEngine:
    """Job after job over one transport."""

    def __init__(self, transport: RingTransport):
        self.transport = transport
        self._scratch = bytearray(transport.options.piece_bytes + 64)

    def run(self, job: Job, outgoing: EdgeSlot, incoming: EdgeSlot, timeout_s: float) -> None:
        """Run it to its end.

        Raises:
            CollectiveError: of one of its kinds; the transport is broken then, and both neighbours know the reason.
        """
        _Run(self.transport, job, outgoing, incoming, timeout_s, self._scratch).run()


class _Run:
    def __init__(
        self,
        transport: RingTransport,
        job: Job,
        outgoing: EdgeSlot,
        incoming: EdgeSlot,
        timeout_s: float,
        scratch: bytearray,
    ):
        self.transport, self.job = transport, job
        self.out_edge, self.in_edge = outgoing, incoming
        self.out_socket, self.in_socket = transport.outgoing, transport.incoming
        self.rank, self.size = transport.rank, transport.size
        self.begun_ns = monotonic_ns()
        self.failure = Failure(transport, job.announcement, timeout_s)
        self.graced = False
        self.deadline = time.monotonic() + timeout_s
        self.scratch = scratch
        # sending
        self.queue: deque[tuple[int, int]] = deque()  # (piece, hop)
        self.sending = memoryview(b"")
        self.rest = memoryview(b"")  # of the message, after ``sending``
        self.unsent = job.plan.sends
        self.held = False  # the next message of the queue has been counted as begun
        # receiving
        self.awaited = job.plan.receives
        self.announced = False
        self.head = bytearray(FRAME.size)
        self.target = memoryview(self.head)
        self.body: tuple[int, int, int, int] | None = None  # kind, piece, hop, length of the frame whose payload comes
        self.ready_ns = self.begun_ns
        self.first_ns = 0

    def run(self) -> None:
        announcement = self.job.announcement.pack()
        self.sending = memoryview(FRAME.pack(ANNOUNCE, 0, 0, len(announcement)) + announcement)
        for index, piece in enumerate(self.job.plan.rows):
            if piece.start == self.rank and piece.hops:
                self.queue.append((index, 1))
        poller = select.poll()
        out_fd, in_fd = self.out_socket.fileno(), self.in_socket.fileno()
        wanted: tuple[int, int] | None = None
        while self.awaited or not self.announced or self.unsent or self.sending or self.rest:
            flowing = self.transport.apply_controls()
            if not flowing:
                self._hold_next()
            moved = self._receive() if self.awaited or not self.announced else False
            if flowing and (self.sending or self.rest or self.queue):
                moved = self._send() or moved
            if moved:
                continue
            want_out = select.POLLIN | (select.POLLOUT if flowing and (self.sending or self.rest or self.queue) else 0)
            want_in = select.POLLIN if self.awaited or not self.announced else 0
            if (want_out, want_in) != wanted:
                if out_fd >= 0:
                    poller.register(out_fd, want_out)
                if want_in:
                    poller.register(in_fd, want_in)
                elif wanted is not None and wanted[1]:
                    poller.unregister(in_fd)
                wanted = (want_out, want_in)
            left_ms = (self.deadline - time.monotonic()) * 1e3
            if left_ms <= 0:
                self._time_out()
                continue
            # A stalled link, and a limit that comes while nothing moves, are looked at again soon.
            for fd, event in poller.poll(min(left_ms + 1, _STALL_POLL_MS if not flowing else 1000)):
                if fd == out_fd and event & (select.POLLIN | select.POLLHUP | select.POLLERR):
                    self._hear_successor()
                    poller.unregister(out_fd)  # it left, having all that it needed
                    out_fd = -1

    # ---- sending

    def _hold_next(self) -> None:
        """On a stalled link the next message counts as begun, as it does where the network has stalled and the socket takes its
        first bytes: that the receiver lacks it is how the diagnosis knows the link."""
        if not self.held and not self.rest and self.queue:
            self.out_edge.begun()
            self.held = True

    def _send(self) -> bool:
        moved = False
        while True:
            if not self.sending:
                if self.rest:
                    self.sending, self.rest = self.rest, memoryview(b"")
                elif self.queue:
                    index, hop = self.queue.popleft()
                    piece = self.job.plan.rows[index]
                    self.sending = memoryview(FRAME.pack(PIECE, index, hop, piece.length))
                    self.rest = self.job.data[piece.offset : piece.offset + piece.length]
                    if not self.held:
                        self.out_edge.begun()
                    self.held = False
                    self.unsent -= 1
                else:
                    return moved
            try:
                if len(self.sending) < 64 and self.rest:
                    count = self.out_socket.sendmsg([self.sending, self.rest[:_SLICE_BYTES]])
                else:
                    count = self.out_socket.send(self.sending[:_SLICE_BYTES])
            except BlockingIOError:
                return moved
            except OSError as error:
                self.failure.lost(self.transport.successor, error.errno)
            moved = True
            self.out_edge.moved(count, monotonic_ns())
            head = min(count, len(self.sending))
            self.sending = self.sending[head:]
            if count > head:
                self.sending, self.rest = self.rest[count - head :], memoryview(b"")

    # ---- receiving

    def _receive(self) -> bool:
        moved = False
        while self.awaited or not self.announced:
            try:
                count = self.in_socket.recv_into(self.target)
            except BlockingIOError:
                return moved
            except OSError as error:
                self.failure.lost(self.transport.predecessor, error.errno, self._rest())
            if count == 0:
                self.failure.lost(self.transport.predecessor, None, self._rest())
            now = monotonic_ns()
            moved = True
            if not self.first_ns:
                self.first_ns = now
            self.in_edge.moved(count, now)
            self.target = self.target[count:]
            if not self.target:
                self._part_complete(now)
        return moved

    def _part_complete(self, now: int) -> None:
        if self.body is None:
            kind, index, hop, length = FRAME.unpack(self.head)
            if kind == PIECE:
                self._expect_piece(index, hop, length)
            elif (kind == ANNOUNCE and length == ANNOUNCEMENT.size) or (kind == ABORT and length <= ABORT_BYTES):
                self.target = memoryview(self.scratch)[:length]
            else:
                self.failure.protocol(self._rest())
            self.body = (kind, index, hop, length)
            if length:
                return
        kind, index, hop, length = self.body
        self.body = None
        self.target = memoryview(self.head)
        if kind == ANNOUNCE:
            theirs = Announcement.unpack(bytes(self.scratch[:length]))
            if theirs != self.job.announcement:
                self.failure.mismatch(theirs, self._rest())
            self.announced = True
            self.in_edge.late(max(0, self.first_ns - self.begun_ns))
        elif kind == ABORT:
            self.failure.told(bytes(self.scratch[:length]), self._rest())
        else:
            self.in_edge.received(max(0, self.first_ns - self.ready_ns), now - self.first_ns)
            self._take(index, hop)
            self.awaited -= 1
        self.ready_ns = monotonic_ns()
        self.first_ns = 0

    def _expect_piece(self, index: int, hop: int, length: int) -> None:
        pieces = self.job.plan.rows
        if not self.announced or index >= len(pieces):
            self.failure.protocol(self._rest())
        piece = pieces[index]
        if length != piece.length or not 1 <= hop <= piece.hops or (piece.start + hop) % self.size != self.rank:
            self.failure.protocol(self._rest())
        if hop <= piece.accumulate:
            self.target = memoryview(self.scratch)[:length]
        else:
            self.target = self.job.data[piece.offset : piece.offset + length]

    def _take(self, index: int, hop: int) -> None:
        piece = self.job.plan.rows[index]
        if hop <= piece.accumulate:
            self.job.add(piece.offset, piece.length, self.scratch)
            if hop == piece.accumulate and self.job.average:
                self.job.divide(piece.offset, piece.length)
        if hop < piece.hops:
            self.queue.append((index, hop + 1))

    # ---- what goes wrong

    def _hear_successor(self) -> None:
        """Backwards comes nothing but a reason to give up, or the end.

        Whoever needs nothing more of this operation may leave; if it was lost, who waits for it says so.
        """
        self.out_socket.settimeout(0.2)
        text = None
        error = None
        try:
            kind, _, _, length = FRAME.unpack(_receive_exactly(self.out_socket, FRAME.size))
            if kind == ABORT and length <= ABORT_BYTES:
                text = _receive_exactly(self.out_socket, length)
        except OSError as raised:
            error = raised.errno
        except EOFError:
            pass
        finally:
            self.out_socket.setblocking(False)
        if text is None and not (self.unsent or self.sending or self.rest or self.queue):
            return
        if text is None:
            self.failure.lost(self.transport.successor, error, self._rest())
        self.failure.told(text, self._rest())

    def _time_out(self) -> None:
        if self.announced and not self.graced:
            self.graced = True
            self.deadline += WITNESS_S
            return
        self.failure.timed_out(self.announced, self.awaited, self._rest())

    def _rest(self) -> bytes:
        return bytes(self.sending) + bytes(self.rest)


def _receive_exactly(connection: object, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))  # type: ignore[attr-defined]
        if not part:
            raise EOFError
        data += part
    return data
