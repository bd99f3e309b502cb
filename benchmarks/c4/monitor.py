"""The real monitors in one process, without Ray: an ``AgentCore`` a virtual node and the ``MasterCore``, at the live pace."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from actors.c4.diagnosis.settings import DiagnosisSettings
from actors.c4.diagnosis.verdict import Verdict
from actors.c4.generation import Generation
from actors.c4.monitors.agent_core import AgentCore
from actors.c4.monitors.judge import DiagnosisJudge
from actors.c4.monitors.master_core import MasterCore, Policy
from actors.c4.monitors.settings import MonitorSettings
from actors.c4.monitors.wire import UnknownGroups, Unpacker
from actors.c4.ports import NumberedVerdict
from actors.c4.recovery.policy import Action, Decision, Situation


def watch_only(verdict: Verdict, situation: Situation) -> Decision:
    """A policy that leaves every fault alone."""
    return Decision(Action.IGNORE, "a trial only watches")


class LocalMonitor:
    """Threads of its own: one an agent, one the master. ``verdicts()`` tells what has been named."""

    def __init__(
        self,
        run: str,
        rings: Path,
        settings: MonitorSettings | None = None,
        diagnosis: DiagnosisSettings | None = None,
        policy: Policy = watch_only,
        on_verdict: Callable[[NumberedVerdict], None] | None = None,
    ):
        self.settings = settings or MonitorSettings()
        self.core = MasterCore(run, self.settings, DiagnosisJudge(diagnosis or self.settings.diagnosis), policy)
        self.bytes = 0
        self.judge_cpu_s = 0.0
        self.agent_cpu_s = 0.0
        self.errors: list[str] = []
        self._run, self._rings = run, rings
        self._on_verdict = on_verdict
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._threads: dict[str, threading.Thread] = {}
        self.silenced: set[str] = set()
        """Nodes whose agents say nothing more (a lost node)."""
        self._start("master", self._judge)

    def begin(self, generation: Generation) -> None:
        """Watch these workers."""
        with self._lock:
            self.core.begin_generation(generation, time.monotonic())
            self.silenced.clear()
        for node in generation.nodes:
            if node not in self._threads:
                self._start(node, lambda node=node: self._agent(node))  # type: ignore[misc]

    def end(self, number: int) -> None:
        """Watch them no longer."""
        with self._lock:
            self.core.end_generation(number)

    def verdicts(self) -> list[NumberedVerdict]:
        """All so far."""
        with self._lock:
            return list(self.core.verdicts)

    def close(self) -> None:
        """End the threads."""
        self._ended.set()
        for thread in self._threads.values():
            thread.join(timeout=10)

    def _start(self, name: str, target: Callable[[], None]) -> None:
        thread = self._threads[name] = threading.Thread(target=target, name=name, daemon=True)
        thread.start()

    def _agent(self, node: str) -> None:
        agent, unpacker = AgentCore(self._run, node, self._rings, self.settings), Unpacker()
        while not self._ended.is_set():
            began, cpu = time.monotonic(), time.thread_time()
            try:
                report = agent.look()
                if report is not None and node not in self.silenced:
                    try:
                        observation = unpacker.unpack(report.packed) if report.packed else None
                    except UnknownGroups:
                        observation = None
                    with self._lock:
                        self.bytes += len(report.packed)
                        orders = self.core.observe(report, observation, time.monotonic())
                    agent.follow(report, orders)
            except Exception as error:
                self.errors.append(f"{node}: {error!r}")
            self.agent_cpu_s += time.thread_time() - cpu
            self._ended.wait(max(0.005, self.settings.poll_s - (time.monotonic() - began)))
        agent.close()

    def _judge(self) -> None:
        while not self._ended.is_set():
            began, cpu = time.monotonic(), time.thread_time()
            try:
                with self._lock:
                    new = self.core.judge(time.monotonic(), time.time())
                for one in new:
                    if self._on_verdict is not None:
                        self._on_verdict(one)
            except Exception as error:
                self.errors.append(f"master: {error!r}")
            self.judge_cpu_s += time.thread_time() - cpu
            self._ended.wait(max(0.005, self.settings.diagnose_s - (time.monotonic() - began)))
