"""Where an engine's token chunks wait for the ingresses that poll for them. Thread-safe; no Ray.

Per ingress one ordered queue. ``collect`` hands out everything queued as one numbered batch and keeps it until the next poll
acknowledges that number, so a lost answer is simply asked for again and gets the same batch. Chunks never acknowledged can
be taken back (``take_unacked``) to travel with a migrating request.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from actors.llumnix.engine.request import TokenChunk

Batch = tuple[int, list[TokenChunk]]


class OutboxError(RuntimeError):
    """The poll contradicts the queue: chunks were lost, or an acknowledgement of what was never sent."""


@dataclass
class _Queue:
    last_poll: float
    sequence: int = 0
    """Number of the newest batch handed out."""
    in_flight: list[TokenChunk] | None = None
    """The newest batch, until it is acknowledged."""
    pending: list[TokenChunk] = field(default_factory=list)
    overflowed: bool = False
    polls: int = 0
    """Polls waiting at this moment."""
    wakers: list[Callable[[], None]] = field(default_factory=list)
    """Called once, when something new came for the asyncio polls."""


class Outbox:
    """Acknowledged long-poll queues, one an ingress.

    Memory is bounded: a queue of more than ``max_chunks`` is emptied and its ingress is reported idle at once.
    """

    def __init__(self, max_chunks: int = 200_000, clock: Callable[[], float] = time.monotonic):
        self._max_chunks = max_chunks
        self._clock = clock
        self._queues: dict[str, _Queue] = {}
        self._changed = threading.Condition()

    def put(self, chunks: Iterable[TokenChunk]) -> None:
        """Queue chunks for their ingresses, in order."""
        wakers: list[Callable[[], None]] = []
        with self._changed:
            for chunk in chunks:
                queue = self._queue(chunk.ingress_id)
                if queue.overflowed:
                    continue
                queue.pending.append(chunk)
                if len(queue.pending) > self._max_chunks:
                    queue.overflowed = True
                    queue.pending, queue.in_flight = [], None
                if queue.wakers:
                    wakers += queue.wakers
                    queue.wakers = []
            self._changed.notify_all()
        for wake in wakers:
            wake()

    def collect(self, ingress_id: str, ack: int, timeout_s: float) -> Batch:
        """The next batch for an ingress that has everything up to batch ``ack``: (batch number, chunks).

        Waits up to ``timeout_s`` for something to come, then answers (``ack``, []). A poll that repeats an older ``ack``
        gets the same batch again. Raises OutboxError if ``ack`` was never handed out, or if the queue overflowed.
        """
        deadline = self._clock() + timeout_s
        with self._changed:
            queue = self._queue(ingress_id)
            queue.polls += 1
            try:
                while True:
                    batch = self._next_batch(queue, ingress_id, ack)
                    left = deadline - self._clock()
                    if batch is not None or left <= 0:
                        return batch or (queue.sequence, [])
                    self._changed.wait(left)
            finally:
                queue.polls -= 1
                queue.last_poll = self._clock()

    async def acollect(self, ingress_id: str, ack: int, timeout_s: float) -> Batch:
        """``collect`` for asyncio: waits without a thread."""
        loop = asyncio.get_running_loop()
        deadline = self._clock() + timeout_s
        with self._changed:
            queue = self._queue(ingress_id)
            queue.polls += 1
        waker: Callable[[], None] | None = None
        try:
            while True:
                event = asyncio.Event()
                waker = _waker(loop, event)
                with self._changed:
                    batch = self._next_batch(queue, ingress_id, ack)
                    left = deadline - self._clock()
                    if batch is not None or left <= 0:
                        return batch or (queue.sequence, [])
                    queue.wakers.append(waker)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(event.wait(), left)
        finally:
            with self._changed:
                if waker in queue.wakers:
                    queue.wakers.remove(waker)
                queue.polls -= 1
                queue.last_poll = self._clock()

    def take_unacked(self, request_id: str) -> tuple[TokenChunk, ...]:
        """Remove and return, in order, the chunks of a request that no ingress has acknowledged."""
        taken: list[TokenChunk] = []
        with self._changed:
            for queue in self._queues.values():
                for chunks in (queue.in_flight, queue.pending):
                    if chunks and any(chunk.request_id == request_id for chunk in chunks):
                        taken += [chunk for chunk in chunks if chunk.request_id == request_id]
                        chunks[:] = [chunk for chunk in chunks if chunk.request_id != request_id]
        return tuple(taken)

    def idle_ingresses(self, older_than_s: float) -> tuple[str, ...]:
        """Ingresses that have not polled for so long, or whose queue overflowed: abort their requests, then ``drop`` them."""
        now = self._clock()
        with self._changed:
            return tuple(
                ingress_id
                for ingress_id, queue in self._queues.items()
                if queue.overflowed or (not queue.polls and now - queue.last_poll > older_than_s)
            )

    def drop(self, ingress_id: str) -> int:
        """Forget an ingress and what waits for it; returns the number of chunks thrown away."""
        with self._changed:
            queue = self._queues.pop(ingress_id, None)
            return 0 if queue is None else len(queue.pending) + len(queue.in_flight or ())

    def __len__(self) -> int:
        """Chunks not yet acknowledged."""
        with self._changed:
            return sum(len(queue.pending) + len(queue.in_flight or ()) for queue in self._queues.values())

    def _queue(self, ingress_id: str) -> _Queue:
        queue = self._queues.get(ingress_id)
        if queue is None:
            queue = self._queues[ingress_id] = _Queue(last_poll=self._clock())
        return queue

    def _next_batch(self, queue: _Queue, ingress_id: str, ack: int) -> Batch | None:
        if queue.overflowed:
            raise OutboxError(f"ingress {ingress_id} did not keep up: its chunks were thrown away")
        if ack > queue.sequence or ack < 0:
            raise OutboxError(
                f"ingress {ingress_id} acknowledges batch {ack}, but the newest is {queue.sequence}: "
                "the instance was restarted or has dropped this ingress"
            )
        if queue.in_flight is not None:
            if ack < queue.sequence:
                return queue.sequence, list(queue.in_flight)
            queue.in_flight = None
        if not queue.pending:
            return None
        queue.sequence += 1
        queue.in_flight, queue.pending = queue.pending, []
        return queue.sequence, list(queue.in_flight)


def _waker(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> Callable[[], None]:
    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # The poller's loop was closed: nobody waits any more.
            loop.call_soon_threadsafe(event.set)

    return wake
