"""The planner: a path for every queue pair of every connection of all jobs, such that no link is the worse for luck.

1. Dual ports: each connection goes out of its left ports and its right ports, and left arrives at left (``tx == rx``).
2. Spines by edge colouring (``colouring``), cores by least load; queue pairs are as many as the granularity of links asks for.
3. Where colouring cannot be even (failed links, unequal demands), shares by linear program (``shares``).
``bound`` says beside each plan what is possible at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from actors.c4.paths.bound import common_rate, cut_bound
from actors.c4.paths.colouring import colour_edges
from actors.c4.paths.errors import PathError, UnreachableError
from actors.c4.paths.maxmin import load_matrix
from actors.c4.paths.routing import NONE, Paths, is_local, links_of
from actors.c4.paths.shares import best_split, near_best_split
from actors.c4.paths.topology import Bools, Fabric, Floats, Ints
from actors.c4.paths.workload import Connections

GOOD_ENOUGH = 0.995
SOLVER_OPTIONS = 3000
"""Above so many options shares are found by multiplicative weights, which grow only linearly."""


@dataclass(frozen=True)
class Plan:
    """F flows (queue pairs) of C connections."""

    connections: Connections
    flow_connection: Ints
    """[F]: the connection of each flow."""
    paths: Paths
    weight: Floats
    """[F]: the flow's share of its connection's data; each connection's sum is 1."""

    def __len__(self) -> int:
        return len(self.flow_connection)

    @property
    def src_nic(self) -> Ints:
        return self.connections.src_nic[self.flow_connection]

    @property
    def dst_nic(self) -> Ints:
        return self.connections.dst_nic[self.flow_connection]

    def links(self, fabric: Fabric) -> Ints:
        """[F, 8]: as ``links_of``."""
        return links_of(fabric, self.src_nic, self.dst_nic, self.paths)

    def rate(self, fabric: Fabric) -> float:
        """The common rate of all connections, in Gb/s for a demand of 1."""
        return common_rate(fabric, self.connections, self.flow_connection, self.weight, self.links(fabric))

    def load(self, fabric: Fabric) -> Floats:
        """[links]: for a common rate of 1."""
        flow_load = self.connections.demand[self.flow_connection] * self.weight
        matrix = load_matrix(np.zeros(len(self), np.int64), flow_load, self.links(fabric), 1, fabric.links)
        return np.asarray(matrix.sum(0), float).ravel()


def plan_paths(fabric: Fabric, connections: Connections, min_queue_pairs: int = 4, max_queue_pairs: int = 8) -> Plan:
    """Paths for all connections at once.

    Args:
        min_queue_pairs: of a connection, where it has that many lanes; two a port let shares alone make up for most failures.
        max_queue_pairs: of a connection; at least the number of ports to use them all.

    Raises:
        UnreachableError: failures cut two NICs apart.
        PathError: fewer than one queue pair.
    """
    if not 1 <= min_queue_pairs <= max_queue_pairs:
        raise PathError(f"Queue pairs a connection must be 1 or more, not {min_queue_pairs} to {max_queue_pairs}.")
    lane_connection, tx, rx = lanes(fabric, connections, max_queue_pairs)
    most = np.bincount(lane_connection, minlength=len(connections)).max(initial=1)
    local = is_local(fabric, connections.src_nic, connections.dst_nic)[lane_connection]
    share = connections.demand / np.maximum(np.bincount(lane_connection, minlength=len(connections)), 1)
    over = share[lane_connection[~local]]
    even = len(over) > 0 and bool(np.ptp(over) < 1e-9 * over.max())
    pairs = max(1, min_queue_pairs // int(most))
    if even:
        limits = (pairs, max(1, max_queue_pairs // int(most)))
        pairs = _granularity(fabric, connections, lane_connection, tx, rx, local, limits)
    flow_connection, tx, rx, local = (np.repeat(array, pairs) for array in (lane_connection, tx, rx, local))
    weight = 1.0 / np.bincount(flow_connection, minlength=len(connections))[flow_connection]
    spine = np.full(len(tx), NONE)
    who = np.flatnonzero(~local)
    source = fabric.leaf(connections.src_nic[flow_connection[who]], tx[who])
    target = fabric.leaf(connections.dst_nic[flow_connection[who]], rx[who])
    load = connections.demand[flow_connection[who]] * weight[who]
    if even:
        # In mixed order the queue pairs of a connection fall on different spines than its neighbours': shares can then be shifted
        # from any link to any other. In their own order connections would form blocks with no spine in common.
        mixed = np.random.default_rng(0).permutation(len(who))
        slots = _slots(fabric, source, target)
        spine[who[mixed]] = colour_edges(source[mixed], target[mixed], fabric.up_alive, fabric.down_alive, slots)
    _place_rest(fabric, spine, who, source, target, load)
    core = _cores(fabric, spine, who, source, target, load)
    plan = Plan(connections, flow_connection, Paths(tx, spine, core, rx), weight)
    return balanced(fabric, plan)


def lanes(fabric: Fabric, connections: Connections, limit: int) -> tuple[Ints, Ints, Ints]:
    """(connection, port out, port in) of every pair of ports that is used: like to like; crosswise only where nothing else
    is left.

    Raises:
        UnreachableError: a connection has none.
    """
    src, dst, ports = connections.src_nic, connections.dst_nic, fabric.spec.ports_per_nic
    if limit < ports:
        return _single_lanes(fabric, connections)
    found: list[tuple[Ints, int, int]] = []
    have = np.zeros(len(connections), np.int64)
    order = [(p, p) for p in range(ports)] + [(p, r) for p in range(ports) for r in range(ports) if p != r]
    straight = np.zeros(len(connections), bool)
    for place, (tx, rx) in enumerate(order):
        if place == ports:
            straight = have > 0
        can = passable(fabric, src, dst, tx, rx).any(1) & (have < limit) & ~straight
        found.append((np.flatnonzero(can), tx, rx))
        have += can
    if (have == 0).any():
        one = int(np.flatnonzero(have == 0)[0])
        raise UnreachableError(f"Failures have left no path from NIC {src[one]} to NIC {dst[one]}.")
    connection = np.concatenate([who for who, _, _ in found])
    tx_all = np.concatenate([np.full(len(who), tx) for who, tx, _ in found])
    rx_all = np.concatenate([np.full(len(who), rx) for who, _, rx in found])
    order_of = np.argsort(connection, kind="stable")
    return connection[order_of], tx_all[order_of], rx_all[order_of]


def _single_lanes(fabric: Fabric, connections: Connections) -> tuple[Ints, Ints, Ints]:
    """One pair of ports for each connection, the least loaded at both ends, then in both leaves; like to like where possible."""
    src, dst, ports = connections.src_nic, connections.dst_nic, fabric.spec.ports_per_nic
    pairs = sorted(((p, r) for p in range(ports) for r in range(ports)), key=lambda pair: pair[0] != pair[1])
    whole = {pair: passable(fabric, src, dst, *pair).any(1) for pair in pairs}
    load = np.zeros(fabric.links)
    leaf_load = np.zeros((2, fabric.spec.leaves))
    tx, rx = np.zeros(len(connections), np.int64), np.zeros(len(connections), np.int64)
    for c in np.argsort(-connections.demand, kind="stable"):
        best: tuple[tuple[bool, float, float], int, int] | None = None
        for p, r in pairs:
            if whole[p, r][c]:
                ends = max(load[fabric.host_up(src[c], p)], load[fabric.host_down(dst[c], r)])
                leaves = leaf_load[0, fabric.leaf(src[c], p)] + leaf_load[1, fabric.leaf(dst[c], r)]
                key = (p != r, float(ends), float(leaves))
                if best is None or key < best[0]:
                    best = (key, p, r)
        if best is None:
            raise UnreachableError(f"Failures have left no path from NIC {src[c]} to NIC {dst[c]}.")
        tx[c], rx[c] = best[1], best[2]
        load[fabric.host_up(src[c], tx[c])] += connections.demand[c]
        load[fabric.host_down(dst[c], rx[c])] += connections.demand[c]
        leaf_load[0, fabric.leaf(src[c], tx[c])] += connections.demand[c]
        leaf_load[1, fabric.leaf(dst[c], rx[c])] += connections.demand[c]
    every = np.arange(len(connections))
    degree = max(np.bincount(nic).max(initial=0) for nic in (src, dst))
    slots = max(1, -(-int(degree) // ports))
    if np.ptp(connections.demand) == 0 and load[: fabric.host_down(0, 0) * 2].max() > slots * connections.demand[0]:
        # port by port is not always found greedily: it is an edge colouring too, of NICs with ports as colours
        nics = np.arange(fabric.spec.nics)[:, None]
        usable = (
            fabric.alive[fabric.host_up(nics, np.arange(ports))],
            fabric.alive[fabric.host_down(nics, np.arange(ports))],
        )
        port = colour_edges(src, dst, *usable, slots)
        good = (port >= 0).all() and all(whole[int(p), int(p)][c] for c, p in zip(every, port, strict=True))
        if good:
            tx = rx = port
    return every, tx, rx


def passable(fabric: Fabric, src: Ints, dst: Ints, tx: int | Ints, rx: int | Ints) -> Bools:
    """[C, spines]: a whole path exists out of port tx, over that spine, into port rx (any spine for NICs on the same leaf)."""
    ends = fabric.alive[fabric.host_up(src, tx)] & fabric.alive[fabric.host_down(dst, rx)]
    source, target = fabric.leaf(src, tx), fabric.leaf(dst, rx)
    spines = fabric.up_alive[source] & fabric.down_alive[target]
    if fabric.spec.cores:
        from_pod, to_pod = fabric.pod_of_leaf(source), fabric.pod_of_leaf(target)
        cores = (fabric.core_up_alive[from_pod] & fabric.core_down_alive[to_pod]).any(2)
        spines = spines & (cores | (from_pod == to_pod)[:, None])
    local = source == target
    return ends[:, None] & np.where(local[:, None], True, spines)


def _granularity(
    fabric: Fabric, connections: Connections, lane: Ints, tx: Ints, rx: Ints, local: Bools, limits: tuple[int, int]
) -> int:
    """Queue pairs a lane: the fewest with which whole flows fill links nearly as well as a fluid would."""
    source = np.asarray(fabric.leaf(connections.src_nic[lane], tx))[~local]
    target = np.asarray(fabric.leaf(connections.dst_nic[lane], rx))[~local]
    unit = float((connections.demand[lane[~local]] / np.bincount(lane)[lane[~local]]).max())
    bound = cut_bound(fabric, connections)
    rates: dict[int, float] = {}
    for pairs in range(limits[0], limits[1] + 1):
        rate = bound
        for node, usable in ((source, fabric.up_alive), (target, fabric.down_alive)):
            degree = np.bincount(node, minlength=fabric.spec.leaves) * pairs
            slots = np.ceil(degree / np.maximum(usable.sum(1), 1)).max(initial=1.0)
            rate = min(rate, fabric.spec.uplink_gbps * pairs / (slots * unit))
        rates[pairs] = rate
        if rate >= GOOD_ENOUGH * bound:
            return pairs
    # of equals the finer, which leaves most to the shares
    return max(rates, key=lambda pairs: (rates[pairs], pairs))


def _slots(fabric: Fabric, source: Ints, target: Ints) -> int:
    most = 1
    for node, usable in ((source, fabric.up_alive), (target, fabric.down_alive)):
        degree = np.bincount(node, minlength=fabric.spec.leaves)
        most = max(most, int(np.ceil(degree / np.maximum(usable.sum(1), 1)).max(initial=1)))
    return most


def _place_rest(fabric: Fabric, spine: Ints, who: Ints, source: Ints, target: Ints, load: Floats) -> None:
    """The least loaded way for flows that colouring left over, the largest first; changes ``spine``."""
    up = np.zeros((fabric.spec.leaves, fabric.spec.spines))
    down = np.zeros_like(up)
    placed = spine[who] >= 0
    np.add.at(up, (source[placed], spine[who[placed]]), load[placed])
    np.add.at(down, (target[placed], spine[who[placed]]), load[placed])
    rest = np.flatnonzero(~placed)
    for place in rest[np.argsort(-load[rest], kind="stable")]:
        u, v = source[place], target[place]
        usable = fabric.up_alive[u] & fabric.down_alive[v]
        if fabric.spec.cores and (pods := (int(fabric.pod_of_leaf(u)), int(fabric.pod_of_leaf(v))))[0] != pods[1]:
            usable = usable & (fabric.core_up_alive[pods[0]] & fabric.core_down_alive[pods[1]]).any(1)
        total = np.where(usable, np.maximum(up[u], down[v]) + 1e-6 * (up[u] + down[v]), np.inf)
        chosen = int(total.argmin())
        if not usable[chosen]:
            raise UnreachableError(f"Failures have left no path from leaf {u} to leaf {v}.")
        spine[who[place]] = chosen
        up[u, chosen] += load[place]
        down[v, chosen] += load[place]


def _cores(fabric: Fabric, spine: Ints, who: Ints, source: Ints, target: Ints, load: Floats) -> Ints:
    """[F]: the least loaded core of the spine's plane for flows between pods."""
    core = np.full(len(spine), NONE)
    if not fabric.spec.cores:
        return core
    from_pod, to_pod = np.asarray(fabric.pod_of_leaf(source)), np.asarray(fabric.pod_of_leaf(target))
    far = np.flatnonzero(from_pod != to_pod)
    up, down = np.zeros(fabric.core_up_alive.shape), np.zeros(fabric.core_up_alive.shape)
    for place in far[np.argsort(-load[far], kind="stable")]:
        a, b, s = from_pod[place], to_pod[place], spine[who[place]]
        usable = fabric.core_up_alive[a, s] & fabric.core_down_alive[b, s]
        total = np.where(usable, np.maximum(up[a, s], down[b, s]) + 1e-6 * (up[a, s] + down[b, s]), np.inf)
        chosen = int(total.argmin())
        if not usable[chosen]:
            raise UnreachableError(f"Failures have left no core between pods {a} and {b} on spine {s}.")
        core[who[place]] = chosen
        up[a, s, chosen] += load[place]
        down[b, s, chosen] += load[place]
    return core


def balanced(fabric: Fabric, plan: Plan) -> Plan:
    """The plan with shares by linear program where its common rate falls short of the cut bound; paths are kept.

    Only connections of racks that hold an overloaded link are touched: elsewhere even shares are as good.
    """
    bound = cut_bound(fabric, plan.connections)
    if plan.rate(fabric) >= GOOD_ENOUGH * bound:
        return plan
    links = plan.links(fabric)
    hot = plan.load(fabric) * bound > fabric.capacity * (1 + 1e-9)
    touched = np.where(links >= 0, hot[links], False).any(1)
    better = plan
    for chosen in neighbourhoods(fabric, plan, touched):
        within = np.isin(plan.flow_connection, chosen)
        weight = better.weight.copy()
        weight[within] = split_over(
            fabric, better, chosen, plan.flow_connection[within], links[within], np.zeros(int(within.sum()))
        )
        better = replace(better, weight=weight)
    return better if better.rate(fabric) > plan.rate(fabric) else plan


def neighbourhoods(fabric: Fabric, plan: Plan, touched: Bools) -> list[Ints]:
    """Connections that share a rack, at the same end, with a ``touched`` flow, in sets that have no rack in common."""
    racks = fabric.spec.leaves // fabric.spec.ports_per_nic
    source, target = np.asarray(fabric.rack(plan.src_nic)), np.asarray(fabric.rack(plan.dst_nic)) + racks
    near = np.isin(source, source[touched]) | np.isin(target, target[touched])
    if not near.any():
        return []
    graph = sparse.coo_array((np.ones(int(near.sum())), (source[near], target[near])), shape=(2 * racks, 2 * racks))
    _, label = csgraph.connected_components(graph, directed=False)
    of_flow = label[source]
    return [np.unique(plan.flow_connection[near & (of_flow == one)]) for one in np.unique(of_flow[near & touched])]


def split_over(
    fabric: Fabric, plan: Plan, chosen: Ints, option_connection: Ints, option_links: Ints, cost: Floats
) -> Floats:
    """[options]: best shares of the ``chosen`` connections over the options, all other flows as planned."""
    others = ~np.isin(plan.flow_connection, chosen)
    flow_load = (plan.connections.demand[plan.flow_connection] * plan.weight)[others]
    matrix = load_matrix(np.zeros(len(flow_load), np.int64), flow_load, plan.links(fabric)[others], 1, fabric.links)
    fixed = np.asarray(matrix.sum(0), float).ravel()
    owner, demand = np.searchsorted(chosen, option_connection), plan.connections.demand[chosen]
    if len(owner) > SOLVER_OPTIONS:
        return near_best_split(fabric, owner, demand, option_links, fixed, cost).share
    return best_split(fabric, owner, demand, option_links, fixed, cut_bound(fabric, plan.connections), cost).share
