"""The flow simulator: what jobs get from the network, at one moment or over time with failures. Fluid flows, max-min fair shares.

Two ways of sharing a connection's data over its queue pairs: "elastic", a queue pair takes the next message when it is free, so
the connection's rate is the sum of its flows'; "planned", by the plan's shares, so that all flows of a channel advance together.
A channel (ring) is as fast as its slowest connection, and an operation ends with its slowest channel, as in NCCL.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.c4.paths.errors import PathError
from actors.c4.paths.maxmin import load_matrix, max_min
from actors.c4.paths.plan import Plan
from actors.c4.paths.routing import FIRST_SOURCE_PORT, SOURCE_PORTS, EcmpRouter, Flows, Paths, links_of
from actors.c4.paths.topology import Bools, Fabric, Floats, Ints
from actors.c4.paths.workload import Connections


@dataclass(frozen=True)
class Traffic:
    """Flows as the network has them now. ``weight`` None: elastic queue pairs."""

    connections: Connections
    flow_connection: Ints
    paths: Paths
    weight: Floats | None

    def links(self, fabric: Fabric) -> Ints:
        """[F, 8]."""
        return links_of(
            fabric, self.connections.src_nic[self.flow_connection], self.connections.dst_nic[self.flow_connection], self.paths
        )  # fmt: skip


def planned_traffic(plan: Plan, paths: Paths | None = None) -> Traffic:
    """A plan's flows, on the ``paths`` that they really take (default: the planned ones)."""
    return Traffic(plan.connections, plan.flow_connection, plan.paths if paths is None else paths, plan.weight)


def ecmp_flows(fabric: Fabric, connections: Connections, queue_pairs: int, seed: int) -> tuple[Ints, Flows]:
    """(connection of each flow, flows): random source ports; queue pairs take the bond's ports in turn, one by chance."""
    rng = np.random.default_rng(seed)
    count, ports = len(connections), fabric.spec.ports_per_nic
    of = np.repeat(np.arange(count), queue_pairs)
    first = rng.integers(0, ports, count) if queue_pairs < ports else np.zeros(count, np.int64)
    tx = (first[of] + np.tile(np.arange(queue_pairs), count)) % ports
    source_port = FIRST_SOURCE_PORT + rng.integers(0, SOURCE_PORTS, len(of))
    return of, Flows(connections.src_nic[of], connections.dst_nic[of], source_port, tx)


def ecmp_traffic(fabric: Fabric, connections: Connections, queue_pairs: int, seed: int) -> Traffic:
    """ECMP's luck: the same seed for the switches' hashes and for the ports."""
    of, flows = ecmp_flows(fabric, connections, queue_pairs, seed)
    return Traffic(connections, of, EcmpRouter(fabric, seed).route(flows), None)


def channel_rates(fabric: Fabric, traffic: Traffic, active: Bools | None = None) -> Floats:
    """[channels]: bus bandwidth of each channel in Gb/s; 0 for one that is not ``active``."""
    connections, of = traffic.connections, traffic.flow_connection
    active = np.ones(connections.channels, bool) if active is None else active
    channel = connections.channel[of]
    runs = active[channel]
    rates = np.zeros(connections.channels)
    if not runs.any():
        return rates
    links = traffic.links(fabric)[runs]
    if traffic.weight is None:
        count = int(runs.sum())
        flow = max_min(load_matrix(np.arange(count), np.ones(count), links, count, fabric.links), fabric.capacity)
        total = np.bincount(of[runs], flow, minlength=len(connections))
        rates[active] = np.inf
        np.minimum.at(rates, connections.channel, total / connections.demand)
        return np.where(active, rates, 0.0)
    load = connections.demand[of[runs]] * traffic.weight[runs]
    renumbered = np.cumsum(active) - 1
    matrix = load_matrix(renumbered[channel[runs]], load, links, int(active.sum()), fabric.links)
    rates[active] = max_min(matrix, fabric.capacity)
    return rates


def job_rates(connections: Connections, rates: Floats) -> Floats:
    """[jobs]: an operation is as fast as the slowest channel."""
    found = np.full(connections.jobs, np.inf)
    np.minimum.at(found, connections.channel_job, rates)
    return found


def link_use(fabric: Fabric, traffic: Traffic, rates: Floats) -> Floats:
    """[links]: utilisation, when every flow carries its share of its channel's rate (elastic flows: an even one)."""
    connections, of = traffic.connections, traffic.flow_connection
    share = 1.0 / np.bincount(of, minlength=len(connections))[of] if traffic.weight is None else traffic.weight
    load = rates[connections.channel[of]] * connections.demand[of] * share
    links = traffic.links(fabric)
    flat = links.ravel()
    total = np.bincount(flat[flat >= 0], np.repeat(load, links.shape[1])[flat >= 0], minlength=fabric.links)
    return total / np.where(fabric.capacity > 0, fabric.capacity, np.inf)


@dataclass(frozen=True)
class Stage:
    """From ``at_s`` on the network is so."""

    at_s: float
    fabric: Fabric
    traffic: Traffic


@dataclass(frozen=True)
class Operation:
    """A collective that ended."""

    job: int
    began_s: float
    ended_s: float
    busbw_gbps: float
    """Of each channel (NIC): its gigabits over the operation's seconds."""


def run(stages: Sequence[Stage], channel_gigabits: float, compute_s: float, until_s: float) -> tuple[Operation, ...]:
    """All jobs repeat: one operation of ``channel_gigabits`` in every connection of every channel, then ``compute_s`` of silence.

    Rates change only at events: an operation or channel ends, a job begins again, a stage begins.

    Args:
        stages: the first at 0, in order of time, all with the same connections.
        until_s: operations under way then are dropped.

    Raises:
        PathError: no stage at 0, or stages out of order.
    """
    if not stages or stages[0].at_s != 0 or any(a.at_s >= b.at_s for a, b in itertools.pairwise(stages)):
        raise PathError("Stages must begin at 0 and be in order of time.")
    if not channel_gigabits > 0:
        raise PathError(f"An operation must move data, not {channel_gigabits} gigabits.")
    connections = stages[0].traffic.connections
    left = np.full(connections.channels, channel_gigabits)
    began = np.zeros(connections.jobs)
    wakes = np.full(connections.jobs, np.inf)  # when a silent job begins again
    done: list[Operation] = []
    now, at = 0.0, 0
    rates: Floats | None = None
    while now < until_s:
        active = left > 0
        if rates is None:
            rates = channel_rates(stages[at].fabric, stages[at].traffic, active)
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = np.where(active & (rates > 0), left / rates, np.inf)
        next_stage = stages[at + 1].at_s if at + 1 < len(stages) else np.inf
        step_to = min(now + float(ends.min(initial=np.inf)), float(wakes.min(initial=np.inf)), next_stage, until_s)
        finished = active & (now + ends <= step_to * (1 + 1e-12))
        left = np.where(active, left - rates * (step_to - now), left)
        left[finished] = 0.0
        left = np.where(active & ~finished, np.maximum(left, 1e-12 * channel_gigabits), left)
        now = step_to
        changed = bool(finished.any())
        busy = np.bincount(connections.channel_job, left > 0, minlength=connections.jobs) > 0
        for job in np.unique(connections.channel_job[finished]):
            if not busy[job]:
                done.append(Operation(int(job), float(began[job]), now, channel_gigabits / (now - float(began[job]))))
                wakes[job] = now + compute_s
        for job in np.flatnonzero(wakes <= now):
            left[connections.channel_job == job] = channel_gigabits
            began[job], wakes[job] = now, np.inf
            changed = True
        if at + 1 < len(stages) and stages[at + 1].at_s <= now:
            at += 1
            changed = True
        if changed:
            rates = None
    return tuple(done)
