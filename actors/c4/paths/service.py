"""The C4P master: jobs register their connections, ask for each one's queue pairs, report how those fare. No Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from actors.c4.paths.actuators import Order, orders_of
from actors.c4.paths.bound import Bound, certified_bound
from actors.c4.paths.errors import PathError
from actors.c4.paths.plan import Plan, plan_paths
from actors.c4.paths.probing import Network, find_ports
from actors.c4.paths.replan import replan
from actors.c4.paths.shares import rebalanced
from actors.c4.paths.topology import Fabric
from actors.c4.paths.workload import Connections, joined


@dataclass(frozen=True)
class Standing:
    """How good the plan in force is."""

    rate_gbps: float
    bound: Bound
    moved_fraction: float
    """Of the flows of the last change."""


class PathMaster:
    """Holds the plan of all jobs. Not thread-safe: one owner calls it (an actor, a simulation)."""

    def __init__(
        self, fabric: Fabric, network: Network, min_queue_pairs: int = 4, max_queue_pairs: int = 8, seed: int = 0
    ):
        self._fabric, self._network, self._seed = fabric, network, seed
        self._pairs = (min_queue_pairs, max_queue_pairs)
        self._jobs: dict[str, Connections] = {}
        self._plan: Plan | None = None
        self._orders: tuple[Order, ...] = ()
        self._moved = 0.0

    @property
    def fabric(self) -> Fabric:
        return self._fabric

    @property
    def orders(self) -> tuple[Order, ...]:
        """In force, one for each flow of the plan."""
        return self._orders

    @property
    def plan(self) -> Plan:
        """Raises PathError while no job is registered."""
        if self._plan is None:
            raise PathError("No job is registered with the path master.")
        return self._plan

    def register(self, job: str, connections: Connections) -> None:
        """A job begins: all jobs are planned together, anew; running jobs learn new orders at their next question.

        Raises:
            PathError: the name is taken.
        """
        if job in self._jobs:
            raise PathError(f"Job {job!r} is registered already.")
        self._jobs[job] = connections
        try:
            self._plan_all()
        except PathError:
            del self._jobs[job]
            raise

    def release(self, job: str) -> None:
        """A job ended; the others keep their paths.

        Raises:
            PathError: it is not registered.
        """
        self._place_of(job)
        kept = [name for name in self._jobs if name != job]
        first, last = self._range(job)
        plan = self.plan
        del self._jobs[job]
        if not kept:
            self._plan, self._orders = None, ()
            return
        stays = (plan.flow_connection < first) | (plan.flow_connection >= last)
        moved_down = plan.flow_connection[stays]
        moved_down = np.where(moved_down >= last, moved_down - (last - first), moved_down)
        connections = joined([self._jobs[name] for name in kept])
        self._plan = Plan(connections, moved_down, plan.paths.only(stays), plan.weight[stays])
        kept_ports = [order.source_port for order, keep in zip(self._orders, stays, strict=True) if keep]
        self._orders = orders_of(self._plan, kept_ports)

    def queue_pairs(self, job: str, connection: int) -> tuple[Order, ...]:
        """The answer to a job that asks for one of its connections.

        Raises:
            PathError: no such job or connection.
        """
        first, last = self._range(job)
        if not 0 <= connection < last - first:
            raise PathError(f"Job {job!r} has connections 0 to {last - first - 1}, not {connection}.")
        return tuple(order for order in self._orders if order.connection == first + connection)

    def completed(self, job: str, times_s: Mapping[int, tuple[float, ...]]) -> None:
        """Message times that a job saw, for each of its connections one a queue pair: shares follow them (dynamic balancing).

        Raises:
            PathError: a connection with another number of queue pairs.
        """
        first, _ = self._range(job)
        plan = self.plan
        weight = plan.weight.copy()
        for connection, times in times_s.items():
            mine = np.flatnonzero(plan.flow_connection == first + connection)
            if len(times) != len(mine):
                raise PathError(
                    f"Connection {connection} of job {job!r} has {len(mine)} queue pairs, not {len(times)}."
                )
            weight[mine] = rebalanced(weight[mine], np.zeros(len(mine), np.int64), np.asarray(times, float))
        self._plan = replace(plan, weight=weight)
        self._orders = orders_of(self._plan, [order.source_port for order in self._orders])

    def network_changed(self, fabric: Fabric, network: Network) -> Standing:
        """Links failed: only flows that must move do, and shares around them change; new ports are probed for the moved."""
        self._fabric, self._network = fabric, network
        done = replan(fabric, self.plan)
        self._plan, self._moved = done.plan, done.moved_fraction
        ports = np.asarray([order.source_port for order in self._orders], np.int64)
        moved = np.flatnonzero(done.moved)
        if len(moved):
            part = replace(
                done.plan, flow_connection=done.plan.flow_connection[moved], paths=done.plan.paths.only(moved),
                weight=done.plan.weight[moved],
            )  # fmt: skip
            ports[moved] = find_ports(network, part, self._seed + 1).source_port
        self._orders = orders_of(done.plan, ports.tolist())
        return self.standing()

    def standing(self) -> Standing:
        """The plan in force beside what is possible."""
        return Standing(self.plan.rate(self._fabric), certified_bound(self._fabric, self.plan.connections), self._moved)

    def _plan_all(self) -> None:
        before = self._plan
        connections = joined(list(self._jobs.values()))
        plan = plan_paths(self._fabric, connections, *self._pairs)
        ports = find_ports(self._network, plan, self._seed)
        self._plan, self._orders = plan, orders_of(plan, ports.source_port.tolist())
        self._moved = 1.0 if before is not None else 0.0

    def _place_of(self, job: str) -> int:
        if job not in self._jobs:
            raise PathError(f"Job {job!r} is not registered with the path master.")
        return list(self._jobs).index(job)

    def _range(self, job: str) -> tuple[int, int]:
        place = self._place_of(job)
        sizes = [len(connections) for connections in self._jobs.values()]
        return sum(sizes[:place]), sum(sizes[: place + 1])
