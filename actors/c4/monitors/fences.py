"""Which processes of generations that are over must still end, node by node. Pure, no Ray.

A worker is known by its pid and the time its process started: a pid comes back, the pair does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from actors.c4.generation import Generation
from actors.c4.ports import Fence


class Fences:
    """Of a run."""

    def __init__(self) -> None:
        self._open: dict[str, dict[tuple[int, int], Fence]] = {}
        self._started: dict[tuple[int, str, int], int] = {}

    def add(self, generation: Generation) -> None:
        """All its workers must end."""
        for worker in generation.workers:
            ticks = self._started.get((generation.number, worker.node_id, worker.pid), -1)
            of_node = self._open.setdefault(worker.node_id, {})
            of_node.setdefault((generation.number, worker.pid), Fence(generation.number, worker.pid, ticks))

    def spare(self, generation: Generation) -> None:
        """A generation begins: what bears the pid of one of its workers is that worker and must live."""
        for worker in generation.workers:
            of_node = self._open.get(worker.node_id, {})
            for key in [key for key in of_node if key[1] == worker.pid]:
                del of_node[key]
        self._started = {key: ticks for key, ticks in self._started.items() if key[0] >= generation.number}

    def learn(self, number: int, node_id: str, started: Iterable[tuple[int, int]]) -> bool:
        """(pid, start ticks) of a generation's workers, as their agent saw them first; True when that is news."""
        news = False
        for pid, ticks in started:
            news |= (number, node_id, pid) not in self._started
            if self._started.setdefault((number, node_id, pid), ticks) == ticks:
                of_node = self._open.get(node_id, {})
                if (fence := of_node.get((number, pid))) is not None and fence.started_ticks < 0:
                    of_node[(number, pid)] = replace(fence, started_ticks=ticks)
        return news

    def done(self, node_id: str, gone: Iterable[Fence]) -> bool:
        """These processes have ended; True when any was awaited."""
        of_node = self._open.get(node_id, {})
        found = [of_node.pop((fence.generation, fence.pid), None) for fence in gone]
        return any(one is not None for one in found)

    def of_node(self, node_id: str) -> tuple[Fence, ...]:
        """What the node's agent must end."""
        return tuple(self._open.get(node_id, {}).values())

    def nodes(self) -> tuple[str, ...]:
        """Nodes with processes that must end."""
        return tuple(node for node, fences in self._open.items() if fences)

    def snapshot(self) -> dict[str, Any]:
        """JSON values."""
        fences = [[node, f.generation, f.pid, f.started_ticks] for node in self.nodes() for f in self.of_node(node)]
        return {"open": fences, "started": [[*key, ticks] for key, ticks in self._started.items()]}

    def restore(self, data: Mapping[str, Any]) -> None:
        """Takes a snapshot over; KeyError, TypeError or ValueError when it is none."""
        self._started = {(int(g), str(node), int(pid)): int(ticks) for g, node, pid, ticks in data["started"]}
        for node, number, pid, ticks in data["open"]:
            self._open.setdefault(str(node), {})[(number, pid)] = Fence(number, pid, ticks)
