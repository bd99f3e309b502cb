"""The C4 agent: an actor on every node that reads its workers' rings, reports to the master and carries its orders out.

A thin shell around ``agent_core``. Workers never wait for it. Its loop survives every exception: logged, counted, reported.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError

from actors.c4 import processes
from actors.c4.generation import Worker
from actors.c4.injection.faults import KINDS, Fault, FaultName, InjectionError
from actors.c4.injection.inject import Injected, Target, inject, with_peer
from actors.c4.monitors.agent_core import AgentCore
from actors.c4.monitors.lines import LineAddress, hold_line
from actors.c4.monitors.self_start import SelfStart
from actors.c4.monitors.settings import MonitorSettings
from actors.c4.monitors.stacks import take
from actors.c4.ports import Stack
from actors.c4.recorder.layout import ring_path

logger = logging.getLogger("sextant.c4.agent")

MASTER_WAIT_S = 5.0


class C4Agent:
    """Of one node. Async actor: everything runs on one event loop; what takes long runs in threads."""

    def __init__(
        self, run: str, node_id: str, ring_folder: str, settings: MonitorSettings, master: Any, line: LineAddress
    ):
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        self._core = AgentCore(run, node_id, Path(ring_folder), settings)
        self._settings, self._master, self._line = settings, master, line
        self._tasks: set[asyncio.Task[Any]] = set()
        self._injected: list[Injected] = []
        self._ended = asyncio.Event()
        self._self_start = SelfStart()

    async def run(self) -> None:
        """Read, report, obey; until ``stop``."""
        if not self._self_start.begin():
            return
        core = self._core
        self._spawn(hold_line(self._line, core.node_id, self._ended))
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                report = core.look()
                if report is not None:
                    call = self._master.observe.remote(report)
                    core.follow(report, await asyncio.wait_for(_result(call), MASTER_WAIT_S))
                while core.stacks_wanted:
                    self._spawn(self._take_stacks(core.stacks_wanted.pop()))
            except (RayActorError, TimeoutError) as error:
                core.unanswered()
                logger.info("the master does not answer (%s); trying again", type(error).__name__)
                await asyncio.sleep(self._settings.poll_s)
            except Exception:
                core.errors += 1
                logger.exception("the agent's loop failed and goes on")
                await asyncio.sleep(min(1.0, 5 * self._settings.poll_s))
            await asyncio.sleep(max(0.01, self._settings.poll_s - (time.monotonic() - began)))

    async def wait_for_end(self) -> None:
        """Pends while this process lives."""
        await self._ended.wait()

    async def stop(self) -> None:
        """End the loop and remove the rings of this run whose workers are gone."""
        self._ended.set()
        for injected in self._injected:
            with contextlib.suppress(OSError, InjectionError):
                injected.stop()
        self._core.close(remove_rings=True)

    async def pid(self) -> int:
        """Of this agent."""
        return os.getpid()

    async def stacks(self, rank: int) -> str:
        """Of a worker of this node, taken now."""
        worker = self._core.reader.worker(rank)
        if worker is None:
            return f"[rank {rank} is not watched on this node]"
        identity = worker.ring.identity if worker.ring is not None else None
        return await asyncio.to_thread(take, worker.pid, worker.path, identity)

    async def inject(self, fault: Fault, worker: Worker, generation: int, control_folder: str) -> str:
        """Apply a fault to a worker of this node; returns a sentence.

        Raises:
            InjectionError: it cannot be applied.
        """
        reader = self._core.reader.worker(worker.rank)
        if reader is None or reader.started_ticks < 0:
            raise InjectionError(f"Rank {worker.rank} does not run on this node any more.")
        ring = ring_path(self._core.folder, self._core.run, generation, worker.rank, worker.pid)
        target = Target(worker.rank, worker.pid, reader.started_ticks, ring, self._node_pids(fault, worker))
        fault = with_peer(fault, target)
        injected = await asyncio.to_thread(inject, fault, target, Path(control_folder))
        self._injected.append(injected)
        lasting = not KINDS[fault.name].inside or fault.name is FaultName.SLOW_COMPUTE
        if fault.duration_s is not None and lasting:
            self._spawn(self._stop_later(injected, fault.duration_s))
        for_s = f" for {fault.duration_s:g} s" if fault.duration_s is not None else ""
        to = f" to rank {fault.peer}" if fault.peer is not None else ""
        return f"{fault.name} at rank {fault.rank}{to}{for_s}"

    def _node_pids(self, fault: Fault, worker: Worker) -> tuple[tuple[int, int], ...]:
        """For the loss of this node: its other workers, then the raylet that started this agent."""
        if fault.name is not FaultName.NODE_LOSS:
            return ()
        others = [(pid, ticks) for pid, ticks in self._core.reader.started() if pid != worker.pid]
        raylet = os.getppid()
        facts = processes.look(raylet)
        return (*others, *([(raylet, facts.started_ticks)] if facts is not None else []))

    async def _take_stacks(self, rank: int) -> None:
        worker = self._core.reader.worker(rank)
        if worker is not None:
            self._core.add_stack(Stack(rank, worker.pid, await self.stacks(rank)))

    async def _stop_later(self, injected: Injected, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await asyncio.to_thread(injected.stop)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._core.errors += 1
            logger.error("a task of the agent failed", exc_info=error)


async def _result(reference: Any) -> Any:
    return await reference
