"""The C4 master actor: gathers a run's observations, has them judged, decides, and answers who asks (see ``master``).

A thin shell around ``master_core``: it unpacks reports, keeps an agent on every node, judges at a steady pace, writes down what
a successor must know, logs verdicts and exports figures. Workers never call it, so they never wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.c4.generation import Generation
from actors.c4.injection.faults import Fault, InjectionError
from actors.c4.monitors import metrics
from actors.c4.monitors.agent import C4Agent
from actors.c4.monitors.judge import DiagnosisJudge
from actors.c4.monitors.lines import Lines
from actors.c4.monitors.master_core import MasterCore, Policy
from actors.c4.monitors.self_start import SelfStart
from actors.c4.monitors.settings import MonitorSettings
from actors.c4.monitors.wire import UnknownGroups, Unpacker
from actors.c4.ports import MasterStatus, NumberedVerdict, Orders, Report
from actors.c4.recovery.policy import decide

logger = logging.getLogger("sextant.c4.master")

NAMESPACE = "sextant_c4"
SUPERVISE_S = 0.25
SILENT_S = 0.6
"""A node that says nothing for so long is asked whether its raylet lives: an agent may be starved on a busy host."""
SPARE_NODES_S = 5.0
RAYLET_WAIT_S = 1.0
RAYLET_TRIES = 3
"""A refused connection is a dead raylet at once; a silent host must be silent so often."""


@dataclass(frozen=True)
class MasterSetup:
    """What a master is made of; the same for every life of the actor."""

    run: str
    settings: MonitorSettings
    ring_folder: str
    """Of the workers' rings, the same path on every node."""
    state_file: str
    """On the master's node."""
    control_folder: str = ""
    """Of fault injection, on the workers' nodes; empty: there is none."""
    policy: Policy = decide


@dataclass
class _Agent:
    handle: Any
    watch: asyncio.Task[None] | None = None


@dataclass
class _Cost:
    since_s: float = field(default_factory=time.monotonic)
    spent_s: float = 0.0
    ms_per_s: float = 0.0


class C4Master:
    """See the module. Async actor; every method runs on one event loop, so the core needs no lock."""

    def __init__(self, setup: MasterSetup):
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        self._setup = setup
        self._core = MasterCore(setup.run, setup.settings, DiagnosisJudge(setup.settings.diagnosis), setup.policy)
        self._state = Path(setup.state_file)
        self._written = 0
        self._restored = self._restore()
        self._unpackers: dict[str, tuple[float, Unpacker]] = {}
        self._agents: dict[str, _Agent] = {}
        self._not_before: dict[str, float] = {}
        self._news = asyncio.Event()
        self._ended = asyncio.Event()
        self._cost = _Cost()
        self._started_at = time.time()
        self._lines = Lines(self._line_ended)
        self._raylets: dict[str, tuple[str, int]] = {}
        self._me = ray.get_runtime_context().current_actor
        self._self_start = SelfStart()

    async def run(self) -> None:
        """Judge, supervise agents, count spare nodes; until ``stop``."""
        if not self._self_start.begin():
            return
        await self._lines.open()
        loops = (
            ("judging", self._judge, self._setup.settings.diagnose_s),
            ("supervision", self._supervise, SUPERVISE_S),
            ("count of spare nodes", self._count_spares, SPARE_NODES_S),
        )
        await asyncio.gather(*(self._forever(what, work, every_s) for what, work, every_s in loops))

    # ---- called by the trainer

    async def begin_generation(self, generation: Generation) -> None:
        """Watch these workers; ValueError when the number is not above the last one's."""
        self._core.begin_generation(generation, time.monotonic())
        self._write_down()
        logger.info(
            "c4 run=%s generation=%d begins with %d workers", self._setup.run, generation.number, generation.world_size
        )
        await self._supervise()

    async def end_generation(self, number: int, reason: str) -> None:
        """Stop judging it."""
        if self._core.end_generation(number):
            logger.info("c4 run=%s generation=%d ended: %s", self._setup.run, number, reason)
            self._write_down()

    async def worker_raised(self, number: int, rank: int, message: str) -> None:
        """The user's loop raised in a worker: the stop that follows is no fault of a node."""
        logger.info("c4 run=%s generation=%d: the loop of rank %d raised: %s", self._setup.run, number, rank, message)
        self._core.worker_raised(number, time.monotonic())

    async def loop_reads_shares(self, number: int) -> None:
        """The loop asks for its share of the batch: the policy may rebalance."""
        self._core.loop_reads_shares(number)
        self._write_down()

    async def request_fence(self, number: int, reason: str) -> None:
        """Have all workers of the generations up to this number killed."""
        logger.info("c4 run=%s generation=%d is fenced off: %s", self._setup.run, number, reason)
        self._core.request_fence(number)
        self._write_down()

    async def fences_left(self) -> int:
        """Processes of past generations that have not been seen to end yet."""
        return self._core.fences_left()

    async def quarantine(self) -> dict[str, str]:
        """Node id -> why it is kept out."""
        return dict(self._core.quarantine)

    async def set_quarantine(self, node_id: str, reason: str) -> None:
        """Keep a node out."""
        self._core.set_quarantine(node_id, reason)
        self._write_down()

    async def release(self, node_id: str) -> bool:
        """Let a node in again; False when it was not kept out."""
        released = self._core.release(node_id)
        self._write_down()
        return released

    async def generation(self) -> Generation | None:
        """The current one."""
        return self._core.generation

    async def verdicts(self, after: int = 0, wait_s: float = 0.0) -> tuple[NumberedVerdict, ...]:
        """Those with a number above ``after``; waits up to ``wait_s`` for the first one."""
        deadline = time.monotonic() + wait_s
        while not (found := tuple(one for one in self._core.verdicts if one.number > after)):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), left)
        return found

    async def status(self) -> MasterStatus:
        """All that is known now."""
        return self._core.status(time.monotonic(), self._cost.ms_per_s)

    async def stacks(self, rank: int, wait_s: float = 8.0) -> str:
        """Stacks of a rank's process, taken now; a sentence in brackets when they cannot be had."""
        worker = self._core.worker(rank)
        agent = self._agents.get(worker.node_id) if worker is not None else None
        if agent is None:
            return f"[rank {rank} runs on no watched node]"
        try:
            return str(await asyncio.wait_for(_result(agent.handle.stacks.remote(rank)), wait_s))
        except (TimeoutError, RayActorError) as error:
            return f"[the agent of rank {rank} did not answer: {type(error).__name__}]"

    async def inject(self, fault: Fault) -> str:
        """Inject a fault through the agent of its rank's node; returns a sentence.

        Raises:
            InjectionError: injection is not enabled in this run, there is no such rank, or the fault could not be applied.
        """
        if not self._setup.settings.injection:
            raise InjectionError(f"The run {self._setup.run} was not started with fault injection enabled.")
        worker, generation = self._core.worker(fault.rank), self._core.generation
        if worker is None or generation is None or self._core.state != "watching":
            size = generation.world_size if generation is not None else 0
            raise InjectionError(f"There is no rank {fault.rank}: the run {self._setup.run} has {size} ranks now.")
        agent = self._agents.get(worker.node_id)
        if agent is None:
            raise InjectionError(f"The node of rank {fault.rank} has no agent yet.")
        call = agent.handle.inject.remote(fault, worker, generation.number, self._setup.control_folder)
        try:
            return str(await _result(call))
        except RayTaskError as error:
            if isinstance(error.cause, InjectionError):
                raise error.cause from None
            raise
        except RayActorError:
            return f"{fault.name} at rank {fault.rank}: its agent ended with the node"

    async def stop(self) -> None:
        """End agents and loops; the actor itself is ended by ``stop_master``."""
        self._ended.set()
        self._lines.close()
        stops = [agent.handle.stop.remote() for agent in self._agents.values()]
        with contextlib.suppress(Exception):
            await asyncio.wait_for(asyncio.gather(*map(_result, stops), return_exceptions=True), 5.0)
        for agent in self._agents.values():
            if agent.watch is not None:
                agent.watch.cancel()
            ray.kill(agent.handle)
        self._agents.clear()
        self._state.unlink(missing_ok=True)

    async def pid(self) -> int:
        """Of this actor's process."""
        return os.getpid()

    async def agents(self) -> dict[str, Any]:
        """Node id -> handle of its agent."""
        return {node_id: agent.handle for node_id, agent in self._agents.items()}

    # ---- called by agents

    async def observe(self, report: Report) -> Orders:
        """Take a report in; the answer says what to do."""
        began = time.process_time()
        observation = None
        if report.packed:
            known = self._unpackers.get(report.node_id)
            if known is None or known[0] != report.incarnation:
                known = self._unpackers[report.node_id] = (report.incarnation, Unpacker())
            try:
                observation = known[1].unpack(report.packed)
            except UnknownGroups:
                pass  # asked for in the orders
            except ValueError as error:
                logger.warning("agent of node %s: %s", report.node_id, error)
            metrics.observed.increase(len(report.packed), run=self._setup.run)
        orders = self._core.observe(report, observation, time.monotonic())
        if report.stacks:
            self._core.take_stacks(report)
            for stack in report.stacks:
                logger.warning(
                    "c4 run=%s stacks of rank %d (pid %d):\n%s", self._setup.run, stack.rank, stack.pid, stack.text
                )
        metrics.agent_cost.set(report.cost_ms_per_s / 1e3, run=self._setup.run, node=report.node_id)
        metrics.agent_errors.set(report.errors, run=self._setup.run, node=report.node_id)
        self._spend(time.process_time() - began)
        return orders

    # ---- background

    async def _judge(self) -> None:
        began = time.process_time()
        new = self._core.judge(time.monotonic(), time.time())
        self._spend(time.process_time() - began)
        for one in new:
            metrics.tell(self._setup.run, one)
        if new:
            self._news.set()
        if self._core.version != self._written:
            self._write_down()

    async def _supervise(self) -> None:
        """An agent on every node that must have one."""
        now = time.monotonic()
        for node_id in self._core.nodes_to_watch() if self._lines.address is not None else ():
            if node_id in self._agents or now < self._not_before.get(node_id, 0.0) or self._ended.is_set():
                continue
            strategy = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
            actor: Any = ray.remote(C4Agent)
            handle = actor.options(
                name=f"c4-agent-{self._setup.run}-{node_id[:8]}-{int(self._started_at * 1000)}",
                namespace=NAMESPACE,
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=100,
                scheduling_strategy=strategy,
            ).remote(
                self._setup.run, node_id, self._setup.ring_folder, self._setup.settings, self._me, self._lines.address
            )
            agent = self._agents[node_id] = _Agent(handle)
            agent.watch = asyncio.get_running_loop().create_task(self._watch(node_id, handle))
        silent = self._core.silent_nodes(now, SILENT_S)
        for node_id in (*silent, *self._core.nodes.agents_lost()):
            await self._line_ended(node_id)
        self._export()

    async def _watch(self, node_id: str, handle: Any) -> None:
        """Hear when an agent's process ends: Ray restarts it; only a dead node's is gone for good."""
        while not self._ended.is_set():
            try:
                await handle.wait_for_end.remote()
                return
            except ActorDiedError as error:
                logger.warning("the agent of node %s is gone: %s", node_id, str(error).splitlines()[0])
                if not await self._raylet_answers(node_id):
                    self._core.nodes.node_lost(node_id)
                self._not_before[node_id] = time.monotonic() + 2.0
                self._agents.pop(node_id, None)
                return
            except RayActorError:
                logger.warning("the agent of node %s died and is restarted", node_id)
                self._core.nodes.agent_lost(node_id, time.monotonic())
                await asyncio.sleep(0.2)
            except RayTaskError:
                logger.exception("the watch of node %s's agent failed", node_id)
                await asyncio.sleep(1.0)

    async def _line_ended(self, node_id: str) -> None:
        """The agent's process has ended, or says nothing: alone, or with its node?"""
        if self._ended.is_set():
            return
        if await self._raylet_answers(node_id):
            if node_id not in self._core.nodes.agents_lost():
                logger.warning("the agent of node %s died or is held up; its node lives", node_id)
            self._core.nodes.agent_lost(node_id, time.monotonic())
        else:
            logger.warning("node %s is lost: neither agent nor raylet answer", node_id)
            self._core.nodes.node_lost(node_id)

    async def _raylet_answers(self, node_id: str) -> bool:
        """Whether the node's raylet takes connections; when its address is unknown, the node counts as living."""
        address = self._raylets.get(node_id)
        if address is None:
            return True
        for _ in range(RAYLET_TRIES):
            try:
                _, writer = await asyncio.wait_for(asyncio.open_connection(*address), RAYLET_WAIT_S)
            except TimeoutError:
                continue  # a busy host, or this loop's own lateness, is no proof
            except OSError:
                return False
            writer.close()
            return True
        return False

    async def _count_spares(self) -> None:
        nodes = await asyncio.to_thread(ray.nodes)
        self._raylets = {node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"]) for node in nodes}
        used = self._core.generation.nodes if self._core.generation is not None else ()
        able = [node["NodeID"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        self._core.spare_nodes = sum(node not in used and node not in self._core.quarantine for node in able)

    def _export(self) -> None:
        run, core = self._setup.run, self._core
        watched = core.generation.world_size if core.generation is not None and core.state == "watching" else 0
        metrics.ranks_watched.set(watched, run=run)
        metrics.quarantined.set(len(core.quarantine), run=run)
        metrics.master_cost.set(self._cost.ms_per_s / 1e3, run=run)
        if (operation_s := core.pace_s()) > 0:
            metrics.operation_interval.set(operation_s, run=run)

    def _spend(self, seconds: float) -> None:
        cost, now = self._cost, time.monotonic()
        cost.spent_s += seconds
        if now - cost.since_s >= 2.0:
            cost.ms_per_s = cost.spent_s / (now - cost.since_s) * 1e3
            cost.since_s, cost.spent_s = now, 0.0

    async def _forever(self, what: str, work: Callable[[], Coroutine[Any, Any, None]], every_s: float) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                await work()
            except Exception:
                logger.exception("the master's %s failed and goes on", what)
                await asyncio.sleep(0.5)
            await asyncio.sleep(max(0.01, every_s - (time.monotonic() - began)))

    # ---- what a successor must know

    def _write_down(self) -> None:
        """Whole or not at all; a failure is logged, training does not hang on it."""
        self._written = self._core.version
        try:
            self._state.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._state.parent, prefix=f".{self._state.name}.")
            with os.fdopen(handle, "w") as file:
                json.dump(self._core.snapshot(), file)
            Path(temporary).replace(self._state)
        except OSError as error:
            logger.error("the master's state cannot be written to %s: %s", self._state, error.strerror)

    def _restore(self) -> bool:
        try:
            data = json.loads(self._state.read_text())
            if data["run"] != self._setup.run:
                raise ValueError(f"it belongs to the run {data['run']}")
            self._core.restore(data, time.monotonic())
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.error("the state file %s is left aside: %s", self._state, error)
            return False
        logger.warning("c4 run=%s: the master is back; generation and quarantine are known again", self._setup.run)
        return True


async def _result(reference: Any) -> Any:
    return await reference
