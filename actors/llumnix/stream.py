"""One request's tokens on their way to its reader: what the frontend puts in, the HTTP response takes out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from actors.llumnix.engine.request import Request
from actors.llumnix.journal import Delta, Journal


class GenerationFailed(RuntimeError):
    """The request was accepted but could not be completed."""


class Stream:
    """One request's tokens as they come: ``async for delta in stream``. Raises GenerationFailed or RequestError."""

    def __init__(self, request: Request, on_close: Callable[[Stream], None]):
        self.request = request
        self.journal = Journal(request.request_id)
        self.instance_id: str | None = None
        """Where the newest epoch's tokens come from."""
        self.started = asyncio.Event()
        """The first token is here, or there will be none."""
        self.last_heard = 0.0
        self.recoveries = 0
        self.recovering = False
        self._deltas: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
        self._on_close = on_close
        self._ended = False

    def put(self, delta: Delta) -> None:
        """Give the reader one delta; the last one ends the stream."""
        self.started.set()
        self._deltas.put_nowait(delta)
        if delta.finish_reason is not None:
            self._deltas.put_nowait(None)

    def fail(self, error: Exception) -> None:
        """End the stream with an error for the reader."""
        self.journal.close()
        self.started.set()
        self._deltas.put_nowait(error)

    def close(self) -> None:
        """The reader wants no more; aborts the request unless it has ended. Idempotent, never blocks."""
        self._ended = True
        self._deltas.put_nowait(None)
        self._on_close(self)

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        if self._ended:
            raise StopAsyncIteration
        item = await self._deltas.get()
        if isinstance(item, Delta):
            return item
        self._ended = True
        if item is None:
            raise StopAsyncIteration
        raise item
