"""The ingress's half of the serving protocol: places requests, polls every instance, keeps each request's journal.

``submit`` asks the scheduler for an instance and a fencing epoch and hands the request to that instance. One supervised
task per instance long-polls its outbox; tokens go through the request's journal to its ``Stream``. A request whose instance
died, or that no live instance knows any more, goes on elsewhere from its journal under a new epoch: its keys and values
are recomputed, its tokens are not sampled again. A stream that is closed early is aborted everywhere.

Knows Ray and Serve only through ``ports``; runs on one asyncio loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from actors.llumnix.engine.request import Request, RequestError, TokenChunk
from actors.llumnix.journal import JournalError
from actors.llumnix.ports import (
    DispatchRequest,
    InstanceDied,
    InstanceInfo,
    InstancePort,
    Membership,
    Placement,
    SchedulerPort,
    ServiceUnavailable,
)
from actors.llumnix.stream import GenerationFailed, Stream

__all__ = ["Frontend", "FrontendSettings", "GenerationFailed", "ServiceUnavailable", "Stream"]

logger = logging.getLogger("sextant.llumnix.frontend")


@dataclass(frozen=True)
class FrontendSettings:
    """Time limits of an ingress; units in the names."""

    max_recoveries: int = 3
    """How often one request may be continued elsewhere before its client is told of an error."""
    silence_s: float = 5.0
    """A request without a token for so long is looked for: is it still at a live instance?"""
    sweep_interval_s: float = 1.0
    dispatch_timeout_s: float = 30.0
    """How long a request waits for an instance to appear (all of them dead or starting)."""
    min_prompt_for_sharing: int = 32
    """Choices of one prompt this long (tokens) start when the first one's prompt is in the prefix cache."""


class Frontend:
    """See the module. ``connect(handle)`` makes an InstancePort of a handle in the scheduler's membership."""

    def __init__(
        self,
        scheduler: SchedulerPort,
        connect: Callable[[Any], InstancePort],
        settings: FrontendSettings | None = None,
        ingress_id: str | None = None,
    ):
        self.ingress_id = ingress_id or f"ingress-{uuid.uuid4().hex[:12]}"
        self.settings = settings or FrontendSettings()
        self.infos: dict[str, InstanceInfo] = {}
        self._scheduler, self._connect = scheduler, connect
        self._ports: dict[str, InstancePort] = {}
        self._pollers: dict[str, asyncio.Task[None]] = {}
        self._streams: dict[str, Stream] = {}
        self._finished: list[str] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._joined = asyncio.Event()
        self._running = False

    def start(self) -> None:
        """Begin to follow the membership; must be called on the loop that will serve."""
        self._running = True
        self._spawn(self._forever("membership", self._follow_membership))
        self._spawn(self._forever("sweep", self._sweep))

    async def stop(self) -> None:
        """Abort what runs and end every task."""
        self._running = False
        open_requests = list(self._streams)
        for stream in list(self._streams.values()):
            stream.fail(GenerationFailed("The server is shutting down."))
        self._streams.clear()
        tasks = [*self._tasks, *self._pollers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if open_requests:
            with contextlib.suppress(ServiceUnavailable, TimeoutError):
                await asyncio.wait_for(self._scheduler.abort(open_requests), 2.0)

    @property
    def num_instances(self) -> int:
        """Instances that can be reached now."""
        return len(self._ports)

    @property
    def num_streams(self) -> int:
        """Requests under way."""
        return len(self._streams)

    async def submit(self, requests: Sequence[Request]) -> list[Stream]:
        """Start requests that share one prompt. The streams of all are returned at once; when the prompt is long, all but
        the first start after the first's prefill, on the same instance, and find its blocks in the prefix cache.

        Raises RequestError (it can never be served) or ServiceUnavailable; then nothing is left running.
        """
        streams = [self._open(request) for request in requests]
        try:
            await self._place(streams[0])
            rest = streams[1:]
            if rest and len(requests[0].prompt_token_ids) >= self.settings.min_prompt_for_sharing:
                self._spawn(self._start_after(streams[0], rest))
            else:
                for stream in rest:
                    await self._place(stream, near=streams[0].request.request_id)
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return streams

    async def _start_after(self, first: Stream, rest: list[Stream]) -> None:
        await first.started.wait()
        for stream in rest:
            try:
                await self._place(stream, near=first.request.request_id)
            except (RequestError, ServiceUnavailable) as error:
                self._fail(stream, error)

    def _open(self, request: Request) -> Stream:
        if request.request_id in self._streams:
            raise RequestError(f"a request with the id {request.request_id} is already running", "request_id")
        stream = Stream(dataclasses.replace(request, ingress_id=self.ingress_id), self._close)
        stream.last_heard = asyncio.get_running_loop().time()
        self._streams[request.request_id] = stream
        return stream

    async def _place(self, stream: Stream, near: str | None = None, exclude: tuple[str, ...] = ()) -> None:
        """Dispatch a stream's request (from its journal on); retried while instances come and go."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.dispatch_timeout_s
        while not stream.journal.finished:
            placement = await self._dispatch(stream, near, exclude, deadline)
            stream.journal.fence(placement.epoch)
            request = dataclasses.replace(
                stream.request, epoch=placement.epoch, output_token_ids=tuple(stream.journal.token_ids)
            )
            try:
                port = await self._port(placement.instance_id, deadline)
                refusal = await port.add_request(request)
            except InstanceDied as error:
                logger.warning("placing %s on %s failed: %s", request.request_id, placement.instance_id, error)
                exclude = (*exclude, placement.instance_id)
                continue
            if refusal is not None:
                raise RequestError(refusal.message, refusal.param)
            stream.request, stream.instance_id = request, placement.instance_id
            stream.last_heard = loop.time()
            if stream.journal.finished:  # closed while it was being placed
                self._spawn(self._abort(stream))
            return

    async def _dispatch(self, stream: Stream, near: str | None, exclude: tuple[str, ...], deadline: float) -> Placement:
        wanted = DispatchRequest(
            request_id=stream.request.request_id,
            ingress_id=self.ingress_id,
            tokens=len(stream.request.prompt_token_ids) + len(stream.journal.token_ids),
            priority=stream.request.priority,
            arrival_time=stream.request.arrival_time,
            near=near,
            exclude=exclude,
        )
        loop = asyncio.get_running_loop()
        while True:
            try:
                return await self._scheduler.dispatch(wanted)
            except ServiceUnavailable:
                if loop.time() >= deadline:
                    raise
                await asyncio.sleep(0.1)

    async def _port(self, instance_id: str, deadline: float) -> InstancePort:
        """The port of an instance the scheduler named; it may have registered a moment before we hear of it."""
        loop = asyncio.get_running_loop()
        while instance_id not in self._ports:
            self._joined.clear()
            remaining = min(deadline - loop.time(), 2.0)
            try:
                await asyncio.wait_for(self._joined.wait(), max(remaining, 0.01))
            except TimeoutError:
                raise InstanceDied(f"instance {instance_id} is not among the members") from None
        return self._ports[instance_id]

    def _close(self, stream: Stream) -> None:
        request_id = stream.request.request_id
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
        if not stream.journal.finished:
            stream.journal.close()
            stream.started.set()
            if self._running:
                self._spawn(self._abort(stream))

    async def _abort(self, stream: Stream) -> None:
        """Free the request at every instance, whichever owns it and wherever it is being moved."""
        request_id = stream.request.request_id
        port = self._ports.get(stream.instance_id or "")
        if port is not None:  # the quick way; the scheduler then fences every other owner
            with contextlib.suppress(InstanceDied):
                await port.abort(request_id, stream.journal.epoch)
        for attempt in range(20):
            try:
                await self._scheduler.abort([request_id])
                return
            except ServiceUnavailable:
                await asyncio.sleep(min(0.1 * 2**attempt, 2.0))
        logger.error("could not tell the scheduler to abort %s", request_id)

    # ---- tokens

    async def _poll(self, instance_id: str, port: InstancePort) -> None:
        """Long-poll one instance until it dies or leaves."""
        ack = 0
        while True:
            try:
                ack, chunks = await port.collect(self.ingress_id, ack)
            except InstanceDied as error:
                logger.warning("instance %s is gone: %s", instance_id, error)
                self._lost(instance_id)
                return
            for chunk in chunks:
                self._accept(instance_id, chunk)

    def _accept(self, instance_id: str, chunk: TokenChunk) -> None:
        stream = self._streams.get(chunk.request_id)
        if stream is None:
            return  # ended or closed; its abort is on its way
        try:
            if chunk.finish_reason == "abort" and chunk.epoch == stream.journal.epoch:
                # We did not ask for it (then the stream would be gone): the instance gave the request up.
                self._recover(stream, f"instance {instance_id} gave it up")
                return
            delta = stream.journal.accept(chunk)
        except JournalError as error:
            logger.error("protocol error: %s", error)
            self._fail(stream, GenerationFailed(f"The stream of tokens is damaged: {error}."))
            self._spawn(self._abort(stream))
            return
        if delta is None:
            return
        stream.instance_id = instance_id
        stream.last_heard = asyncio.get_running_loop().time()
        if delta.finish_reason == "error":
            self._fail(stream, GenerationFailed(delta.error or "The engine failed."))
            self._finished.append(chunk.request_id)
            return
        stream.put(delta)
        if delta.finish_reason is not None:
            del self._streams[chunk.request_id]
            self._finished.append(chunk.request_id)

    def _fail(self, stream: Stream, error: Exception) -> None:
        self._streams.pop(stream.request.request_id, None)
        stream.fail(error)

    # ---- membership and recovery

    async def _follow_membership(self) -> None:
        version = -1
        while True:
            try:
                members = await self._scheduler.members(version)
            except ServiceUnavailable as error:
                logger.warning("the scheduler cannot be reached: %s", error)
                await asyncio.sleep(0.2)
                continue
            version = members.version
            self._update(members)

    def _update(self, members: Membership) -> None:
        """Poll the instances that joined. One that left is polled until it dies: it may still hold our tokens."""
        self.infos.update(members.infos)
        for instance_id in [name for name, poller in self._pollers.items() if poller.done()]:
            del self._pollers[instance_id]
        for instance_id, handle in members.instances.items():
            if instance_id not in self._pollers:
                self._ports[instance_id] = self._connect(handle)
                task = asyncio.get_running_loop().create_task(self._poll(instance_id, self._ports[instance_id]))
                task.add_done_callback(functools.partial(self._poller_ended, instance_id))
                self._pollers[instance_id] = task
        self._joined.set()

    def _poller_ended(self, instance_id: str, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("polling instance %s failed", instance_id, exc_info=error)
            self._lost(instance_id)

    def _lost(self, instance_id: str) -> None:
        """An instance died: its requests go on elsewhere at once, those that moved are found by the sweep."""
        self._ports.pop(instance_id, None)
        self.infos.pop(instance_id, None)
        for stream in list(self._streams.values()):
            if stream.instance_id == instance_id:
                self._recover(stream, f"instance {instance_id} died", exclude=(instance_id,))

    def _recover(self, stream: Stream, reason: str, exclude: tuple[str, ...] = ()) -> None:
        if not stream.recovering:
            stream.recovering = True
            self._spawn(self._continue_elsewhere(stream, reason, exclude))

    async def _continue_elsewhere(self, stream: Stream, reason: str, exclude: tuple[str, ...]) -> None:
        request_id = stream.request.request_id
        try:
            if exclude:
                # It may have been moved away from the dead instance in time.
                where = await self._locate(request_id)
                if where is not None and where not in exclude and where in self._ports:
                    stream.instance_id = where
                    stream.last_heard = asyncio.get_running_loop().time()
                    return
            stream.recoveries += 1
            if stream.recoveries > self.settings.max_recoveries:
                raise GenerationFailed(f"The request was continued {stream.recoveries - 1} times in vain ({reason}).")
            logger.warning(
                "request %s goes on elsewhere from token %d: %s", request_id, len(stream.journal.token_ids), reason
            )
            await self._place(stream, exclude=exclude)
        except (RequestError, ServiceUnavailable, GenerationFailed) as error:
            if not stream.journal.finished:
                self._fail(stream, GenerationFailed(f"The request could not be continued ({reason}): {error}"))
                await self._abort(stream)
        finally:
            stream.recovering = False

    async def _locate(self, request_id: str) -> str | None:
        try:
            return (await self._scheduler.locate([request_id])).get(request_id)
        except ServiceUnavailable:
            return None  # continuing elsewhere is always safe: the new epoch fences every other owner

    async def _sweep(self) -> None:
        """Reports ends to the scheduler, and looks for requests that fell silent."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.settings.sweep_interval_s)
            finished, self._finished = self._finished, []
            if finished:
                try:
                    await self._scheduler.finished(finished)
                except ServiceUnavailable:
                    self._finished = finished + self._finished
            await self._look_for_silent(loop.time())

    async def _look_for_silent(self, now: float) -> None:
        silent = {
            request_id: stream
            for request_id, stream in self._streams.items()
            if stream.instance_id is not None
            and not stream.recovering
            and now - stream.last_heard > self.settings.silence_s
        }
        if not silent:
            return
        try:
            places = await self._scheduler.locate(list(silent))
        except ServiceUnavailable:
            return
        for request_id, stream in silent.items():
            where = places.get(request_id)
            if where is not None and where in self._ports:
                stream.instance_id, stream.last_heard = where, now
            elif request_id in self._streams and stream.last_heard < now:
                self._recover(stream, "no live instance has it")

    # ---- supervision

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a background task of the ingress failed", exc_info=error)

    async def _forever(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Keep a background task alive: its failure is logged and it begins again."""
        while True:
            try:
                await work()
            except Exception:
                logger.exception("the ingress's %s task failed and begins again", what)
                await asyncio.sleep(0.5)
