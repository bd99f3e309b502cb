"""What an agent does in a round: read, decide whether to report, obey. No Ray: the actor ``agent`` is a shell around it.

The rings are shared memory and the master tells the rest, so that an agent that is restarted has lost nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from pathlib import Path

import numpy as np

from actors.c4 import processes
from actors.c4.diagnosis.observation import Observation, ProcessState
from actors.c4.monitors.node_reader import NodeReader
from actors.c4.monitors.settings import MonitorSettings
from actors.c4.monitors.wire import Packer
from actors.c4.ports import Fence, Orders, Report, Stack
from actors.c4.recorder.errors import RingFormatError
from actors.c4.recorder.files import SIDE_FILES, clean_stale, side_file
from actors.c4.recorder.reader import RingReader, discover

logger = logging.getLogger("sextant.c4.agent")

STALE_RINGS_S = 600.0
"""Rings of dead processes, of whatever run, are removed after this."""
STACKS_S = 2.0
"""A process that is to be killed is left for so long to have its stacks taken first."""


class AgentCore:
    """Of one node."""

    def __init__(self, run: str, node_id: str, ring_folder: Path, settings: MonitorSettings):
        self.run, self.node_id, self.folder, self.settings = run, node_id, ring_folder, settings
        self.reader = NodeReader(node_id, ring_folder, run)
        self.incarnation = time.time()
        self.errors = 0
        self.stacks_wanted: set[int] = set()
        """Ranks whose stacks the shell is to take and to hand to ``add_stack``."""
        self._packer = Packer()
        self._full = True
        self._still = False
        """As of the last read, something did not move: read and report at every poll."""
        self._reported_s = -math.inf
        self._gone: dict[tuple[int, int], Fence] = {}
        self._kill: tuple[Fence, ...] = ()
        self._stacks: list[Stack] = []
        self._spared_until: dict[int, float] = {}
        """By pid: whose stacks are being taken; it is killed after that."""
        self._cost = (time.monotonic(), time.process_time(), 0.0)
        with contextlib.suppress(OSError):
            clean_stale(ring_folder, keep_s=STALE_RINGS_S)

    def look(self) -> Report | None:
        """Look at the processes, and at the rings when a report is due or something may stand still; the report, if due."""
        self._obey_kills()
        now = time.monotonic()
        quiet_s = self.settings.report_s if self.reader.generation else self.settings.idle_report_s
        due = now - self._reported_s >= quiet_s - 0.5 * self.settings.poll_s
        news = bool(self._gone or self._stacks or self._full)
        if not (due or news or self._still or self.reader.glance(self.settings.suspicious_s)):
            return None
        observation = self.reader.read()
        self._still = observation is not None and self._stands_still(observation)
        if not (due or news or self._still):
            return None
        self._reported_s = now
        packed = b""
        if observation is not None:
            packed = self._packer.pack(self.reader.with_blocks(observation), self._full)
        return Report(
            node_id=self.node_id,
            incarnation=self.incarnation,
            packed=packed,
            started=self.reader.started() if self._full else (),
            gone=tuple(self._gone.values()),
            stacks=tuple(self._stacks),
            cost_ms_per_s=self._cost_ms_per_s(now),
            errors=self.errors,
        )

    def follow(self, report: Report, orders: Orders) -> None:
        """The master's answer to ``report``."""
        for fence in report.gone:
            self._gone.pop((fence.generation, fence.pid), None)
        del self._stacks[: len(report.stacks)]
        self._full = orders.full or orders.generation != self.reader.generation
        if orders.full:
            self.reader.whole_window()
        self.reader.watch(orders.generation, orders.workers)
        for rank in orders.stacks:
            if (worker := self.reader.worker(rank)) is not None:
                self._spared_until[worker.pid] = time.monotonic() + STACKS_S
                self.stacks_wanted.add(rank)
        self._kill = orders.kill
        self._obey_kills()

    def unanswered(self) -> None:
        """The master did not answer: a new one will know neither groups nor windows."""
        self._full = True
        self.reader.whole_window()

    def add_stack(self, stack: Stack) -> None:
        """Goes with the next report."""
        self._stacks.append(stack)
        self._spared_until.pop(stack.pid, None)

    def close(self, remove_rings: bool = False) -> None:
        """Let go; ``remove_rings``: of this run's workers that are gone."""
        self.reader.close()
        for found in discover(self.folder, run=self.run) if remove_rings else ():
            if processes.state_of(found.pid, -1) is ProcessState.GONE:
                for path in (found.path, *(side_file(found.path, ending) for ending in SIDE_FILES)):
                    path.unlink(missing_ok=True)

    def _stands_still(self, observation: Observation) -> bool:
        limit = self.settings.suspicious_s
        ranks, progress = observation.ranks, observation.progress
        ill = np.isin(ranks.process_state, (ProcessState.STOPPED, ProcessState.GONE))
        return bool(ill.any() or (ranks.heartbeat_age_s > limit).any() or (progress.open_age_s > limit).any())

    def _obey_kills(self) -> None:
        for fence in self._kill:
            if time.monotonic() < self._spared_until.get(fence.pid, 0.0):
                continue
            key = (fence.generation, fence.pid)
            ticks = fence.started_ticks if fence.started_ticks >= 0 else self._ticks_by_ring(fence)
            if ticks < 0:
                if key not in self._gone:
                    logger.warning(
                        "process %d of generation %d is unknown here: left alone", fence.pid, fence.generation
                    )
                self._gone[key] = fence
            elif not processes.kill(fence.pid, ticks):
                self._gone[key] = fence
            else:
                logger.warning("killed process %d: its generation %d is over", fence.pid, fence.generation)

    def _ticks_by_ring(self, fence: Fence) -> int:
        """Identity of a worker that no agent has reported: its ring tells it."""
        for found in discover(self.folder, run=self.run, generation=fence.generation):
            if found.pid == fence.pid:
                with contextlib.suppress(OSError, RingFormatError), RingReader(found.path) as ring:
                    return ring.identity.process_start or -1
        return -1

    def _cost_ms_per_s(self, now: float) -> float:
        began, cpu_s, cost = self._cost
        if now - began >= 2.0:
            cost = (time.process_time() - cpu_s) / (now - began) * 1e3
            self._cost = (now, time.process_time(), cost)
        return cost
