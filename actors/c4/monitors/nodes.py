"""What the master knows of the nodes: their newest rows, how long each has been silent and why, what it costs. Pure, no Ray."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from actors.c4.diagnosis.observation import Observation, ProcessState, RankRows
from actors.c4.generation import Generation
from actors.c4.monitors.settings import MonitorSettings
from actors.c4.monitors.window import Window
from actors.c4.ports import NodeStatus, Report

RATE_S = 5.0
"""Bytes per second are counted over so long."""


@dataclass
class _Node:
    incarnation: float = -1.0
    reported_s: float = math.nan
    observed: Window | None = None
    lost_agent_s: float | None = None
    """When its agent's process ended (or was found held up) while the node lives; None: it did not."""
    gone: bool = False
    """The cluster says that the node is dead."""
    late_s: float = 0.0
    """The master's own lateness when the newest report came."""
    restarts: int = 0
    errors: int = 0
    cost_ms_per_s: float = 0.0
    rate: float = 0.0
    rate_since_s: float = math.nan
    rate_bytes: int = 0


class Nodes:
    """Of a run."""

    def __init__(self, settings: MonitorSettings):
        self._settings = settings
        self._nodes: dict[str, _Node] = {}
        self._late_s = 0.0

    def heard(self, report: Report, observation: Observation | None, now_s: float) -> None:
        """A report has come; ``observation``: its rows, when they are of the current generation."""
        node = self._nodes.setdefault(report.node_id, _Node())
        if report.incarnation != node.incarnation:
            node.restarts += node.incarnation >= 0
            node.incarnation = report.incarnation
        node.gone, node.lost_agent_s, node.reported_s, node.late_s = False, None, now_s, self._late_s
        node.cost_ms_per_s, node.errors = report.cost_ms_per_s, report.errors
        if observation is not None:
            node.observed = node.observed or Window(self._settings.window_blocks)
            node.observed.take(observation, now_s)
        node.rate_bytes += len(report.packed)
        if math.isnan(node.rate_since_s):
            node.rate_since_s = now_s
        elif now_s - node.rate_since_s >= RATE_S:
            node.rate = node.rate_bytes / (now_s - node.rate_since_s)
            node.rate_bytes, node.rate_since_s = 0, now_s

    def forget_observations(self) -> None:
        """Another generation begins."""
        for node in self._nodes.values():
            node.observed = None

    def master_late(self, seconds: float) -> None:
        """The master judged later than due by this: what it slept through is no silence of others."""
        self._late_s += max(0.0, seconds)

    def agent_lost(self, node_id: str, now_s: float) -> None:
        """The agent's process ended, or it is held up, and the node lives: its silence means nothing for a while."""
        node = self._nodes.setdefault(node_id, _Node())
        if node.lost_agent_s is None:
            node.lost_agent_s = now_s

    def node_lost(self, node_id: str) -> None:
        """The cluster says that the node is dead: nothing will come from it any more."""
        self._nodes.setdefault(node_id, _Node()).gone = True

    def silent(self, node_ids: Iterable[str], now_s: float, for_s: float) -> tuple[str, ...]:
        """Those of which nothing has come for so long, and nothing is known that would explain it."""
        return tuple(
            node_id
            for node_id in node_ids
            if (node := self._nodes.get(node_id)) is not None
            and node.lost_agent_s is None
            and not node.gone
            and self._awake(node, now_s) - node.reported_s > for_s
        )

    def agents_lost(self) -> tuple[str, ...]:
        """Nodes whose agent has not come back."""
        return tuple(name for name, node in self._nodes.items() if node.lost_agent_s is not None and not node.gone)

    def observations(self, generation: Generation, now_s: float, running_s: float, fresh: bool) -> list[Observation]:
        """One a node of the generation; rows age while their agent is silent without an excuse.

        A node that has never reported counts as silent after ``start_grace_s``; ``running_s``: since the generation began.
        """
        parts = []
        for node_id in generation.nodes:
            node = self._nodes.get(node_id)
            if node is not None and node.observed is not None:
                parts.append(self._observation(node, node.observed, now_s, fresh))
            elif running_s > self._settings.start_grace_s:
                parts.append(_never_reported(generation, node_id, running_s))
        return parts

    def statuses(
        self, generation: Generation | None, quarantine: Mapping[str, str], now_s: float
    ) -> tuple[NodeStatus, ...]:
        """A row a node."""
        workers = generation.workers if generation is not None else ()
        names = {worker.node_id: worker.node_name for worker in workers}
        return tuple(
            NodeStatus(
                node_id=node_id,
                node_name=names.get(node_id, ""),
                report_age_s=now_s - node.reported_s,
                agent_restarts=node.restarts,
                agent_errors=node.errors,
                agent_cost_ms_per_s=node.cost_ms_per_s,
                agent_bytes_per_s=node.rate,
                quarantined=quarantine.get(node_id, ""),
            )
            for node_id, node in self._nodes.items()
        )

    def bytes_per_s(self) -> float:
        """Of all agents together."""
        return sum(node.rate for node in self._nodes.values())

    def _awake(self, node: _Node, now_s: float) -> float:
        """Now, less what the master slept since the node's newest report."""
        return now_s - (self._late_s - node.late_s)

    def _observation(self, node: _Node, window: Window, now_s: float, fresh: bool) -> Observation:
        since_s = node.lost_agent_s
        excused = since_s is not None and now_s - since_s < self._settings.agent_restart_s
        part = window.observation(self._awake(node, now_s), aging=not excused, fresh=fresh)
        if not node.gone:
            return part
        never = np.full(len(part.ranks.rank), np.inf, dtype=np.float32)
        return replace(part, ranks=replace(part.ranks, report_age_s=never))


def _never_reported(generation: Generation, node_id: str, silent_s: float) -> Observation:
    """Rows for the workers of a node whose agent has never been heard of."""
    workers = generation.on_node(node_id)
    count = len(workers)
    unknown = np.full(count, np.nan, dtype=np.float32)
    ranks = RankRows(
        rank=np.array([worker.rank for worker in workers], dtype=np.int32),
        node=np.zeros(count, dtype=np.int32),
        process_state=np.full(count, ProcessState.UNKNOWN, dtype=np.uint8),
        heartbeat_age_s=unknown,
        report_age_s=np.full(count, silent_s, dtype=np.float32),
        cpu_share=unknown,
        step_s=unknown,
    )
    return Window.of_ranks_only(ranks, generation.number, node_id)
