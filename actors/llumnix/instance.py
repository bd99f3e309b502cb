"""The engine actor: one engine in its own process, its decode loop on a thread that never leaves it, around it Ray.

Tokens wait in an outbox for the ingresses' long-polls; the load goes to the scheduler after every step, at most one call
under way; migrations run in the migrator's threads. If the engine's loop fails the process ends, so that nobody waits for
it: Serve's health check replaces the instance and the ingresses continue its requests elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import pickle
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import ray

from actors.cluster import metrics
from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.request import Request, RequestError, SamplingParams, TokenChunk
from actors.llumnix.load import InstanceLoad
from actors.llumnix.outbox import Outbox
from actors.llumnix.ports import InstanceInfo, Refusal, ServiceUnavailable
from actors.llumnix.ray_ports import RayScheduler
from actors.llumnix.serve_door import shared_secret
from actors.llumnix.settings import InstanceSettings, SchedulerAddress

if TYPE_CHECKING:  # torch comes with them: the replica, which only creates the actor, does without
    from actors.llumnix.engine.engine import Engine
    from actors.llumnix.engine.loop import EngineLoop
    from actors.llumnix.kv_memory import KVMemory
    from actors.llumnix.migration.channel import PeerAddress
    from actors.llumnix.migration.config import MigrationConfig, MigrationReport
    from actors.llumnix.migration.migrator import Migrator

logger = logging.getLogger("sextant.llumnix.instance")
T = TypeVar("T")
FAILED_EXIT_CODE = 13
MIGRATION_SECRET = "sextant/llumnix/migration"
"""Name of the key with which migrators authenticate to one another."""

_TAGS = ("instance",)
_generated = metrics.counter("llumnix", "generated", "tokens", help="Tokens generated.", tags=_TAGS)
_step = metrics.gauge("llumnix", "decode_step", "milliseconds", help="Median decode step.", tags=_TAGS)
_running = metrics.gauge("llumnix", "running", "requests", help="Requests in the batch.", tags=_TAGS)
_waiting = metrics.gauge("llumnix", "waiting", "requests", help="Requests waiting for admission.", tags=_TAGS)
_free = metrics.gauge("llumnix", "free_kv", "blocks", help="Free or evictable KV blocks.", tags=_TAGS)
_preempted = metrics.gauge("llumnix", "preempted", "requests", help="Preemptions since the start.", tags=_TAGS)


class EngineActor:
    """See the module. Created by ``start_engine_actor``; ``start`` loads the model and must be awaited once."""

    def __init__(
        self,
        instance_id: str,
        config: EngineConfig,
        settings: InstanceSettings,
        migration: MigrationConfig,
        scheduler: SchedulerAddress | None,
    ):
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        self.instance_id = instance_id
        self._config, self._settings, self._migration = config, settings, migration
        self._scheduler = None if scheduler is None else RayScheduler(scheduler)
        self._outbox = Outbox()
        self._info: InstanceInfo | None = None
        self._engine: Engine
        self._engine_loop: EngineLoop
        self._migrator: Migrator | None = None
        self._memory: KVMemory
        self._load: InstanceLoad
        self._load_changed = asyncio.Event()
        self._tokens_since_push = 0
        self._host = ray.util.get_node_ip_address() if settings.reachable_from == "cluster" else None
        self._asyncio_loop: asyncio.AbstractEventLoop
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = False

    async def start(self) -> InstanceInfo:
        """Load the model, start the decode loop, register with the scheduler. Raises ModelLoadError with a sentence."""
        if self._info is not None:
            return self._info
        self._asyncio_loop = asyncio.get_running_loop()
        info = await asyncio.to_thread(self._build)
        self._load = self._engine.load()
        self._engine_loop.start()
        self._spawn("ingress watch", self._watch_ingresses())
        if self._scheduler is not None:
            self._spawn("load report", self._report(self._scheduler, info))
        self._info = info
        logger.info("instance %s serves %s with %d KV blocks", self.instance_id, info.model, info.total_blocks)
        return info

    def _build(self) -> InstanceInfo:
        """Model, KV pool, engine, loop, migrator. Takes seconds; runs in a thread, so that the actor answers pings."""
        import torch

        from actors.llumnix.engine.engine import Engine
        from actors.llumnix.engine.loading import load_model
        from actors.llumnix.engine.loop import EngineLoop
        from actors.llumnix.kv_memory import allocate

        torch.set_num_threads(self._config.threads)
        model, tokenizer = load_model(self._config)
        self._memory = allocate(
            model, self._config.kv_memory_mib, self._config.block_size, self._migration.transports, self._host
        )
        self._engine = Engine(self._config, model, tokenizer, self.instance_id, self._memory.kv)
        self._warm_up()
        self._engine_loop = EngineLoop(self._engine, self._on_chunks, self._on_load, self._on_failure)
        numerics = str(model.numerics)
        self._migrator = self._start_migrator(self._memory, numerics)
        return InstanceInfo(
            instance_id=self.instance_id,
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            model=self._config.model,
            numerics=numerics,
            max_model_len=min(self._engine.max_model_len, self._engine.kv_tokens),
            block_size=self._config.block_size,
            total_blocks=self._memory.num_blocks,
            address=None if self._migrator is None else pickle.dumps(self._migrator.address),
        )

    def _warm_up(self) -> None:
        """Run one tiny request, so that what is compiled or paged in at first use is not paid by the first client."""
        sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        self._engine.add_request(Request("warm-up", (0,), sampling, time.time()))
        while self._engine.has_work():
            failure = self._engine.step().failure
            if failure is not None:
                raise failure

    # ---- called by ingresses

    async def add_request(self, request: Request) -> Refusal | None:
        """Queue a request; a Refusal when it can never be served."""
        try:
            await self._on_engine(lambda: self._engine.add_request(request))
        except RequestError as error:
            return Refusal(str(error), error.param)
        return None

    async def abort(self, request_id: str, up_to_epoch: int | None = None) -> bool:
        """Drop a request and refuse it under every epoch up to ``up_to_epoch`` (all if None)."""
        ended = await self._on_engine(lambda: self._engine.abort(request_id, up_to_epoch))
        if ended and up_to_epoch is None and self._migrator is not None:
            self._migrator.cancel(request_id)
        return ended

    async def collect(self, ingress_id: str, ack: int) -> tuple[int, list[TokenChunk]]:
        """Long-poll: the chunks after batch ``ack`` and their batch number; empty after ``poll_timeout_s``."""
        return await self._outbox.acollect(ingress_id, ack, self._settings.poll_timeout_s)

    # ---- called by the scheduler and the replica

    async def migrate_out(
        self, request_id: str | None, destination: bytes, epoch: int, mode: Literal["live", "recompute"] | None = None
    ) -> MigrationReport:
        """Move a request (the one the policy chooses if None) to the peer with the pickled address ``destination``; returns
        when the migration has ended.

        ``mode``: ``live`` or ``recompute`` (the paper's baseline); the configuration's if None.
        """
        if self._migrator is None:
            raise RuntimeError(f"instance {self.instance_id} cannot migrate: its KV memory has no transport")
        # Setting up the connection to a new peer blocks; the migration itself is waited for without a thread.
        peer: PeerAddress = pickle.loads(destination)
        report = await asyncio.to_thread(self._migrator.start_migration, request_id, peer, epoch, mode)
        return await asyncio.wrap_future(report)

    async def drain(self, draining: bool = True) -> None:
        """Tell the scheduler that this instance is to be emptied."""
        await self._on_engine(lambda: setattr(self._engine, "draining", draining))

    async def info(self) -> InstanceInfo | None:
        """What ``start`` returned."""
        return self._info

    async def address(self) -> PeerAddress | None:
        """Where other instances' migrators find this one; None when it cannot migrate."""
        return None if self._migrator is None else self._migrator.address

    async def load(self) -> InstanceLoad:
        """The load at this moment."""
        return await self._on_engine(lambda: self._engine.load())

    async def holding(self, request_ids: list[str]) -> list[str]:
        """Which of these requests are here; answered between two steps."""
        held = await self._on_engine(lambda: set(self._engine.requests()))
        return [request_id for request_id in request_ids if request_id in held]

    async def audit(self) -> dict[str, Any]:
        """Block accounts (free + cached + referenced == total), requests and chunks still here."""
        audit = await self._on_engine(lambda: self._engine.audit())
        requests = await self._on_engine(lambda: self._engine.requests())
        return dataclasses.asdict(audit) | {"requests": list(requests), "unacked_chunks": len(self._outbox)}

    async def ping(self) -> bool:
        """True while the decode loop lives; the replica's health check."""
        if self._info is not None and not self._engine_loop.alive:
            raise RuntimeError(f"the engine loop of {self.instance_id} has ended")
        return True

    async def wait_for_end(self) -> None:
        """Never returns: the call fails when this process ends, so that whoever awaits it hears of it at once."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """End the decode loop and the migrator and free the KV pool; the process can then be ended."""
        self._stopping = True
        for task in list(self._tasks):
            task.cancel()
        if self._migrator is not None:
            await asyncio.to_thread(self._migrator.close)
        if self._info is not None:
            await asyncio.to_thread(self._engine_loop.stop)
            self._memory.close()

    # ---- the engine's thread

    def _on_chunks(self, chunks: list[TokenChunk]) -> None:
        self._tokens_since_push += sum(len(chunk.token_ids) for chunk in chunks)
        self._outbox.put(chunks)

    def _on_load(self, load: InstanceLoad) -> None:
        self._load = load
        with contextlib.suppress(RuntimeError):  # the actor's loop is closed: the process is ending
            self._asyncio_loop.call_soon_threadsafe(self._load_changed.set)

    def _on_failure(self, error: BaseException) -> None:
        logger.critical("instance %s ends because its engine failed: %s", self.instance_id, error)
        with contextlib.suppress(RuntimeError):
            self._asyncio_loop.call_soon_threadsafe(self._end_process)

    async def _on_engine(self, function: Callable[[], T]) -> T:
        future: Future[T] = self._engine_loop.submit(function)
        return await asyncio.wrap_future(future)

    # ---- background tasks

    async def _report(self, scheduler: RayScheduler, info: InstanceInfo) -> None:
        """Push the load after every step, at most one call under way, and a heartbeat when idle."""
        told_of_trouble = False
        self._load_changed.set()  # register at once
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._load_changed.wait(), self._settings.heartbeat_s)
            self._load_changed.clear()
            load = self._load
            self._export(load)
            try:
                if not await scheduler.call("push_load", load):
                    me = ray.get_runtime_context().current_actor
                    await scheduler.call("register", info, me)
                    self._load_changed.set()
                told_of_trouble = False
            except ServiceUnavailable as error:
                if not told_of_trouble:
                    logger.warning("instance %s cannot reach the scheduler: %s", self.instance_id, error)
                told_of_trouble = True
                await asyncio.sleep(0.2)

    def _export(self, load: InstanceLoad) -> None:
        tag = {"instance": self.instance_id}
        tokens, self._tokens_since_push = self._tokens_since_push, 0
        _generated.increase(tokens, **tag)
        _step.set(load.step_ms, **tag)
        _running.set(len(load.running), **tag)
        _waiting.set(len(load.waiting), **tag)
        _free.set(load.free_blocks, **tag)
        _preempted.set(load.preemptions, **tag)

    async def _watch_ingresses(self) -> None:
        """Abort the requests of ingresses that have stopped polling."""
        while True:
            await asyncio.sleep(min(1.0, self._settings.ingress_timeout_s / 4))
            for ingress_id in self._outbox.idle_ingresses(self._settings.ingress_timeout_s):
                ended = await self._on_engine(functools.partial(self._engine.abort_ingress, ingress_id))
                dropped = self._outbox.drop(ingress_id)
                if ended or dropped:
                    logger.warning(
                        "ingress %s has not polled for %g s: %d requests aborted, %d chunks dropped",
                        ingress_id, self._settings.ingress_timeout_s, ended, dropped,
                    )  # fmt: skip

    def _spawn(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=what)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or self._stopping:
            return
        error = task.exception()
        if self._engine_loop.failure is not None:
            return  # _on_failure tells
        logger.critical("the %s task of instance %s failed", task.get_name(), self.instance_id, exc_info=error)
        self._end_process()

    def _end_process(self) -> None:
        """End this process soon; the pause lets ingresses fetch what is in the outbox."""
        if not self._stopping:
            self._stopping = True
            self._asyncio_loop.call_later(1.0, os._exit, FAILED_EXIT_CODE)

    def _start_migrator(self, memory: KVMemory, numerics: str) -> Migrator | None:
        """None when no transport can read the pool, or when there is no scheduler to renew epochs."""
        from actors.llumnix.migration.messages import KVLayout
        from actors.llumnix.migration.migrator import Migrator

        if not memory.transports or self._scheduler is None:
            return None
        return Migrator(
            self._engine_loop,
            self._outbox,
            memory.transports,
            KVLayout(numerics, self._config.block_size, memory.block_bytes),
            self._reclaim,
            shared_secret(MIGRATION_SECRET),
            instance_id=self.instance_id,
            node_id=ray.get_runtime_context().get_node_id(),
            host=self._host,
            config=self._migration,
        )

    def _reclaim(self, request_id: str, failed_epoch: int) -> int | None:
        """The migrator's epoch authority: the scheduler. Called on a thread of its own; raises when it is not there."""
        if self._scheduler is None:
            raise ServiceUnavailable("This instance has no scheduler.")
        call = self._scheduler.call("reclaim", request_id, failed_epoch)
        epoch: int | None = asyncio.run_coroutine_threadsafe(call, self._asyncio_loop).result(timeout=30.0)
        return epoch


def start_engine_actor(
    instance_id: str,
    config: EngineConfig,
    settings: InstanceSettings,
    migration: MigrationConfig,
    scheduler: SchedulerAddress | None,
    name: str | None = None,
) -> Any:
    """Create an EngineActor in its own process (non-detached: it ends with its creator) and return its handle."""
    options: dict[str, Any] = {
        "num_cpus": settings.num_cpus,
        "num_gpus": settings.num_gpus,
        "resources": dict(settings.resources) or None,
        "max_concurrency": 1000,  # long-polls and death watches are calls that wait
        "max_restarts": 0,
        "name": name,
    }
    actor = ray.remote(EngineActor).options(**{key: value for key, value in options.items() if value is not None})
    return actor.remote(instance_id, config, settings, migration, scheduler)
