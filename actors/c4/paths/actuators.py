"""Putting a plan into force: one interface, three ways (simulator, Linux source ports, RoCE queue pairs)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from actors.c4.paths.errors import PathError
from actors.c4.paths.plan import Plan
from actors.c4.paths.probing import FoundPorts, Network, find_ports
from actors.c4.paths.routing import FIRST_SOURCE_PORT, SOURCE_PORTS, EcmpRouter, Flows
from actors.c4.paths.simulate import Traffic, planned_traffic


@dataclass(frozen=True)
class Order:
    """One queue pair's place in a plan, as a job is told."""

    connection: int
    src_nic: int
    dst_nic: int
    source_port: int
    bond_port: int
    """0 for the left port."""
    share: float
    """Of the connection's data."""


def orders_of(plan: Plan, source_port: Sequence[int]) -> tuple[Order, ...]:
    """A plan with the ports that reach its paths, one order a flow."""
    return tuple(
        Order(int(c), int(s), int(d), int(port), int(tx), float(w))
        for c, s, d, port, tx, w in zip(
            plan.flow_connection, plan.src_nic, plan.dst_nic, source_port, plan.paths.tx, plan.weight, strict=True
        )
    )


class Actuator(Protocol):
    """Makes queue pairs follow orders."""

    def apply(self, orders: Sequence[Order]) -> None:
        """Put them into force, in place of what was ordered before for the same queue pairs."""
        ...


class SimulatorActuator:
    """Orders in the simulated fabric: the switches hash the ordered ports, whatever the planner believed."""

    def __init__(self, router: EcmpRouter):
        self._router = router
        self.orders: tuple[Order, ...] = ()

    def apply(self, orders: Sequence[Order]) -> None:
        self.orders = tuple(orders)

    def flows(self) -> Flows:
        """As ordered."""
        rows = [(o.src_nic, o.dst_nic, o.source_port, o.bond_port) for o in self.orders]
        table = np.asarray(rows, np.int64).reshape(-1, 4)
        return Flows(table[:, 0], table[:, 1], table[:, 2], table[:, 3])

    def traffic(self, plan: Plan, router: EcmpRouter | None = None) -> Traffic:
        """The plan's flows on the paths that their ports really take."""
        return planned_traffic(plan, (router or self._router).route(self.flows()))


class LinuxActuator:
    """Orders as source ports of the ``c4`` process group's connections (``RingOptions.source_port``)."""

    def __init__(self, nic_of_rank: Mapping[int, int]):
        self._nic_of_rank = dict(nic_of_rank)
        self._ports: dict[tuple[int, int], int] = {}

    def apply(self, orders: Sequence[Order]) -> None:
        self._ports |= {(order.src_nic, order.dst_nic): order.source_port for order in orders}

    def source_port(self, source_rank: int, destination_rank: int) -> int | None:
        """The hook; None (any port) for a connection that nobody planned.

        Raises:
            PathError: a rank without a NIC.
        """
        try:
            key = (self._nic_of_rank[source_rank], self._nic_of_rank[destination_rank])
        except KeyError as error:
            raise PathError(f"Rank {error.args[0]} has no NIC in the plan.") from error
        return self._ports.get(key)


@dataclass(frozen=True)
class QueuePair:
    """A RoCE queue pair in state RTS, of type RC or UC."""

    handle: Any
    """pyverbs' QP (or Mlx5QP)."""
    number: int


class RoceActuator:
    """Orders to mlx5 queue pairs through rdma-core's pyverbs. Untested without a NIC: no machine of ours has one.

    ``mlx5dv_modify_qp_udp_sport`` sets the UDP source port (the path), ``mlx5dv_modify_qp_lag_port`` the bond port (counted
    from 1).
    """

    def __init__(
        self,
        queue_pairs: Callable[[Order], Sequence[QueuePair]],
        *,
        dry_run: bool = False,
        say: Callable[[str], None] = print,
    ):
        """``queue_pairs``: those of an order; ``dry_run``: only tell what would be done."""
        self._queue_pairs, self._dry_run, self._say = queue_pairs, dry_run, say

    def apply(self, orders: Sequence[Order]) -> None:
        """Set ports of all queue pairs.

        Raises:
            PathError: pyverbs is not installed, a port is no RoCE v2 source port, or the driver refuses.
        """
        for order in orders:
            if not FIRST_SOURCE_PORT <= order.source_port < FIRST_SOURCE_PORT + SOURCE_PORTS:
                raise PathError(f"{order.source_port} is no RoCE v2 source port (49152 to 65535).")
        mlx5dv = None if self._dry_run else _mlx5dv()
        for order in orders:
            for pair in self._queue_pairs(order):
                where = f"queue pair {pair.number} (NIC {order.src_nic} -> {order.dst_nic})"
                if mlx5dv is None:
                    self._say(
                        f"would set UDP source port {order.source_port} and bond port {order.bond_port + 1} of {where}"
                    )
                    continue
                try:
                    mlx5dv.Mlx5QP.modify_udp_sport(pair.handle, order.source_port)
                    mlx5dv.Mlx5QP.modify_lag_port(pair.handle, order.bond_port + 1)
                except Exception as error:
                    raise PathError(f"The driver refused the ports of {where}: {error}.") from error


def _mlx5dv() -> Any:
    try:
        return importlib.import_module("pyverbs.providers.mlx5.mlx5dv")
    except ImportError as error:
        raise PathError(
            "RoCE needs pyverbs with the mlx5 provider (package rdma-core); use the dry run without."
        ) from error


def nccl_environment(plan: Plan, devices: Sequence[str], traffic_class: int = 106) -> dict[str, str]:
    """The nearest that stock NCCL gets to a plan: its queue pairs' paths stay luck, their number and sharing do not.

    Args:
        devices: RDMA devices of the rails, in order.
        traffic_class: of the fabric's lossless queue.
    """
    most = int(np.bincount(plan.flow_connection).max()) if len(plan) else 1
    return {
        "NCCL_IB_HCA": "=" + ",".join(devices),
        "NCCL_IB_QPS_PER_CONNECTION": str(most),
        "NCCL_IB_SPLIT_DATA_ON_QPS": "1" if most > 1 else "0",
        "NCCL_IB_ADAPTIVE_ROUTING": "0",
        "NCCL_IB_TC": str(traffic_class),
        "NCCL_CROSS_NIC": "0",
    }


def put_into_force(network: Network, plan: Plan, actuator: Actuator, seed: int = 0) -> FoundPorts:
    """Finds a port for every flow by probing, and orders it."""
    ports = find_ports(network, plan, seed)
    actuator.apply(orders_of(plan, ports.source_port.tolist()))
    return ports
