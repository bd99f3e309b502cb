"""A few real instances (engine actors in their own processes) driven directly, without Serve and without a scheduler.

The benchmark alone decides what runs where and when a request moves. Times are the instances' own (``TokenChunk.time``), so that
polling costs no accuracy.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.request import Request, SamplingParams, TokenChunk, TokenLogprob
from actors.llumnix.migration.config import MigrationConfig, MigrationReport
from actors.llumnix.settings import InstanceSettings, SchedulerAddress, SchedulerSettings

INGRESS = NAMESPACE = "benchmark"


class FleetError(RuntimeError):
    """An instance refused, died, or broke the token protocol: the benchmark cannot go on."""


@dataclass
class Stream:
    """One request's tokens as they come, with the epoch and the time (``CLOCK_MONOTONIC`` seconds) of each."""

    request_id: str
    prompt: tuple[int, ...]
    at: int
    """Index of the instance that has it."""
    epoch: int
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    preemptions: int = 0
    reports: list[MigrationReport] = field(default_factory=list)
    """One a committed hop."""
    stale_chunks: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def hops(self) -> int:
        return len(self.reports)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def add(self, chunk: TokenChunk) -> None:
        """Take a chunk in by the ingress's rules: older epochs are dropped, known tokens skipped, a gap is an error."""
        newest = self.epochs[-1] if self.epochs else 0
        if chunk.epoch < newest or self.finished:
            self.stale_chunks += 1
            return
        if chunk.index > len(self.tokens):
            raise FleetError(f"{self.request_id}: token {chunk.index} came after {len(self.tokens)} tokens")
        if chunk.error is not None:
            raise FleetError(f"{self.request_id} failed: {chunk.error}")
        known = len(self.tokens) - chunk.index
        if known and known >= len(chunk.token_ids) and chunk.finish_reason is None:
            return
        fresh = chunk.token_ids[known:]
        self.tokens.extend(fresh)
        self.times.extend([chunk.time] * len(fresh))
        self.epochs.extend([chunk.epoch] * len(fresh))
        self.logprobs.extend((chunk.logprobs or ())[known:])
        self.text += chunk.text
        self.finish_reason, self.stop_reason = chunk.finish_reason, chunk.stop_reason
        self.preemptions = chunk.num_preemptions
        self.changed.set()

    async def wait_for(self, num_tokens: int, timeout_s: float = 120.0) -> None:
        """Returns when so many tokens have come or the request has ended.

        Raises:
            FleetError: nothing came for ``timeout_s``.
        """
        while len(self.tokens) < num_tokens and not self.finished:
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), timeout_s)
            except TimeoutError:
                raise FleetError(f"{self.request_id}: no token for {timeout_s:g} s after {len(self.tokens)}") from None

    async def wait(self) -> Stream:
        """Returns itself when the request has ended."""
        await self.wait_for(1 << 60)
        return self


class Fleet:
    """``async with Fleet(config, count) as fleet``: instances 0 ... count-1, one decode thread each as configured."""

    def __init__(self, config: EngineConfig, count: int, poll_s: float = 0.0):
        """``poll_s``: pause between polls; long when measured, because polls cost the instances' cores some time."""
        self.config, self.count, self.poll_s = config, count, poll_s
        self._actors: list[Any] = []
        self._scheduler: Any = None
        self._infos: list[Any] = []
        self._streams: dict[str, Stream] = {}
        self._polls: list[asyncio.Task[None]] = []
        self._epoch = 0

    async def __aenter__(self) -> Fleet:
        import ray

        from actors.llumnix.instance import start_engine_actor
        from actors.llumnix.scheduler import SCHEDULER_OPTIONS, Scheduler

        settings = InstanceSettings(count=self.count, poll_timeout_s=2.0, ingress_timeout_s=600.0)
        # The real scheduler renews epochs if it must, and takes the loads in; it never orders anything here.
        address = SchedulerAddress(f"fleet-{secrets.token_hex(4)}", namespace=NAMESPACE)
        self._scheduler = (
            ray.remote(Scheduler)
            .options(name=address.prefix, namespace=NAMESPACE, **SCHEDULER_OPTIONS)
            .remote(SchedulerSettings(migration=False))
        )
        try:
            self._actors = [
                start_engine_actor(f"instance-{i}", self.config, settings, MigrationConfig(), address)
                for i in range(self.count)
            ]
            self._infos = list(await asyncio.gather(*[_get(actor.start.remote()) for actor in self._actors]))
        except BaseException:
            await self.__aexit__()
            raise
        self._polls = [asyncio.create_task(self._poll(actor)) for actor in self._actors]
        return self

    async def __aexit__(self, *_: object) -> None:
        import ray

        for task in self._polls:
            task.cancel()
        for result in await asyncio.gather(*self._polls, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        for actor in (*self._actors, self._scheduler):
            if actor is not None:
                ray.kill(actor)
        self._actors, self._scheduler = [], None

    @property
    def numerics(self) -> str:
        return self._infos[0].numerics

    @property
    def total_blocks(self) -> int:
        return self._infos[0].total_blocks

    def next_epoch(self) -> int:
        """As the scheduler issues them."""
        self._epoch = max(self._epoch + 1, time.time_ns())
        return self._epoch

    async def add(
        self, request_id: str, prompt: Sequence[int], sampling: SamplingParams, at: int, output: Sequence[int] = ()
    ) -> Stream:
        """Start a request at instance ``at``; with ``output`` it goes on after tokens generated elsewhere (recompute).

        Raises:
            FleetError: the instance refuses it.
        """
        stream = Stream(request_id, tuple(prompt), at, self.next_epoch())
        stream.tokens.extend(output)
        stream.times.extend([0.0] * len(output))
        stream.epochs.extend([stream.epoch] * len(output))
        self._streams[request_id] = stream
        request = Request(
            request_id,
            stream.prompt,
            sampling,
            time.time(),
            stream.epoch,
            ingress_id=INGRESS,
            output_token_ids=tuple(output),
        )
        refusal = await _get(self._actors[at].add_request.remote(request))
        if refusal is not None:
            raise FleetError(f"{request_id}: {refusal.message}")
        return stream

    async def abort(self, stream: Stream) -> None:
        """End a request at its instance, silently."""
        await _get(self._actors[stream.at].abort.remote(stream.request_id, self.next_epoch()))
        stream.finish_reason = "abort"
        stream.changed.set()

    async def migrate(self, stream: Stream, to: int, mode: str = "live") -> MigrationReport:
        """Move a running request; returns the source's report. What does not commit leaves it where it is.

        ``mode``: ``live``, or ``recompute`` (stopped, and prefilled again at the destination: the paper's baseline).
        """
        epoch = self.next_epoch()
        source, address = self._actors[stream.at], self._infos[to].address
        report: MigrationReport = await _get(source.migrate_out.remote(stream.request_id, address, epoch, mode))
        if report.committed:
            stream.at, stream.epoch = to, epoch
            stream.reports.append(report)
        return report

    async def leaked_blocks(self) -> tuple[int, list[dict[str, Any]]]:
        """(blocks that nobody can ever use again, every instance's account), after everything has ended.

        Counts what the block manager's own audit finds, and everything still referenced, reserved or held although no
        request is left. Waits a moment for the last releases.
        """
        for _ in range(50):
            audits = await asyncio.gather(*[_get(actor.audit.remote()) for actor in self._actors])
            lost = sum(
                audit["leaked"]
                + audit["referenced"]
                + (audit["total"] - audit["free"] - audit["cached"] - audit["referenced"])
                for audit in audits
            )
            if not lost and not any(audit["reservations"] or audit["holds"] or audit["requests"] for audit in audits):
                break
            await asyncio.sleep(0.1)
        owners = sum(audit["reservations"] + audit["holds"] + len(audit["requests"]) for audit in audits)
        return max(lost, owners), list(audits)

    async def _poll(self, actor: Any) -> None:
        ack = 0
        while True:
            ack, chunks = await _get(actor.collect.remote(INGRESS, ack))
            for chunk in chunks:
                stream = self._streams.get(chunk.request_id)
                if stream is not None:
                    stream.add(chunk)
            if self.poll_s:
                await asyncio.sleep(self.poll_s)


async def _get(reference: Any) -> Any:
    return await reference
