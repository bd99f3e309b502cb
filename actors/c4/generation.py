"""One start of a job's worker group: who its workers are. A restart makes the next generation; the old one is fenced off."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Worker:
    """A training worker of a generation."""

    rank: int
    """Global rank."""
    node_id: str
    """Ray's hexadecimal node id."""
    node_name: str
    """For people: address or host name, unique in the cluster."""
    pid: int


@dataclass(frozen=True)
class Generation:
    """A (re)start of the worker group. ``number`` grows by one with each; what carries an older number is refused."""

    number: int
    workers: tuple[Worker, ...]
    """In order of rank."""

    @property
    def world_size(self) -> int:
        return len(self.workers)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Node ids, each once, in order of their first rank."""
        return tuple(dict.fromkeys(worker.node_id for worker in self.workers))

    def on_node(self, node_id: str) -> tuple[Worker, ...]:
        return tuple(worker for worker in self.workers if worker.node_id == node_id)
