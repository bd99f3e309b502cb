"""What no plan can exceed: the greatest common rate of all connections when flows may be split over all paths (concurrent flow).

Two ways: ``certified_bound`` by a pair of feasible solutions of the linear program and its dual (a spray over all paths, and the
tightest cut); where they meet the optimum is proven without solving anything. ``lp_bound`` solves the program (HiGHS).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize, sparse

from actors.c4.paths.errors import PathError
from actors.c4.paths.maxmin import load_matrix
from actors.c4.paths.routing import NONE, Paths, is_local, links_of
from actors.c4.paths.topology import Fabric, Floats, Ints
from actors.c4.paths.workload import Connections


@dataclass(frozen=True)
class Bound:
    """On the common rate (Gb/s for a demand of 1)."""

    upper_gbps: float
    """No routing, split as finely as you like, exceeds it."""
    feasible_gbps: float
    """A split routing that reaches it is known."""
    method: str

    @property
    def tight(self) -> bool:
        """The linear program's optimum is known."""
        return self.upper_gbps <= self.feasible_gbps * (1 + 1e-7)


def certified_bound(fabric: Fabric, connections: Connections, solve_below: int = 400_000) -> Bound:
    """The bound from cuts and a spray; the linear program where they differ and it has at most ``solve_below`` variables."""
    upper = cut_bound(fabric, connections)
    lower = spray_rate(fabric, connections)
    bound = Bound(upper, min(lower, upper), "cut and spray")
    if bound.tight or _variables(fabric, connections) > solve_below:
        return bound
    optimum = lp_bound(fabric, connections)
    return Bound(min(upper, optimum), optimum, "linear program")


def cut_bound(fabric: Fabric, connections: Connections) -> float:
    """The least capacity over demand of the cuts: NICs, racks (both leaves), pods. Each is a feasible dual solution."""
    spec = fabric.spec
    if not len(connections):
        return spec.nic_cap_gbps
    bounds: list[float] = []
    src, dst, demand = connections.src_nic, connections.dst_nic, connections.demand
    ports = np.arange(spec.ports_per_nic)
    nics = np.arange(spec.nics)
    local = is_local(fabric, src, dst)
    racks = spec.leaves // spec.ports_per_nic
    source_rack, target_rack = np.asarray(fabric.rack(src)), np.asarray(fabric.rack(dst))

    def cut(place: Ints, wanted: Floats, capacity: Floats) -> None:
        load = np.bincount(place, wanted, minlength=len(capacity))
        used = load > 0
        if used.any():
            bounds.append(float((capacity[used] / load[used]).min()))

    cut(src, demand, fabric.capacity[fabric.nic_send(nics)])
    cut(dst, demand, fabric.capacity[fabric.nic_take(nics)])
    cut(src, demand, fabric.capacity[fabric.host_up(nics[:, None], ports)].sum(1))
    cut(dst, demand, fabric.capacity[fabric.host_down(nics[:, None], ports)].sum(1))
    over = ~local
    leaves = np.arange(spec.leaves)[:, None]
    spines = np.arange(spec.spines)
    up = fabric.capacity[fabric.leaf_up(leaves, spines)].sum(1).reshape(racks, -1).sum(1)
    down = fabric.capacity[fabric.leaf_down(leaves, spines)].sum(1).reshape(racks, -1).sum(1)
    cut(source_rack[over], demand[over], up)
    cut(target_rack[over], demand[over], down)
    if spec.cores:
        pods = [np.asarray(fabric.pod_of_leaf(rack * spec.ports_per_nic)) for rack in (source_rack, target_rack)]
        far = pods[0] != pods[1]
        grid = (np.arange(spec.pods)[:, None, None], spines[:, None], np.arange(spec.cores))
        cut(pods[0][far], demand[far], fabric.capacity[fabric.core_up(*grid)].sum((1, 2)))
        cut(pods[1][far], demand[far], fabric.capacity[fabric.core_down(*grid)].sum((1, 2)))
    return min(bounds)


def spray_rate(fabric: Fabric, connections: Connections) -> float:
    """The common rate when every connection is spread evenly over all its whole paths: a feasible solution."""
    spec = fabric.spec
    if not len(connections):
        return spec.nic_cap_gbps
    load = np.zeros(fabric.links)
    local = is_local(fabric, connections.src_nic, connections.dst_nic)
    index = np.arange(len(connections))
    options: list[tuple[Paths, Ints]] = []
    # with all cores up, each takes the same part of a spine's flows: no need to list them
    evenly = bool(fabric.core_up_alive.all() and fabric.core_down_alive.all())
    none = np.full(len(index), NONE)
    for port in range(spec.ports_per_nic):
        full = np.full(len(index), port)
        options.append((Paths(full, none, none, full).only(local), index[local]))
        source = fabric.leaf(connections.src_nic, port)
        target = fabric.leaf(connections.dst_nic, port)
        far = ~local & (fabric.pod_of_leaf(source) != fabric.pod_of_leaf(target))
        near = ~local & ~far
        for spine in range(spec.spines):
            options.append((Paths(full, full * 0 + spine, none, full).only(near), index[near]))
            if evenly:
                options.append((Paths(full, full * 0 + spine, none, full).only(far), index[far]))
                continue
            options.extend(
                (Paths(full, full * 0 + spine, full * 0 + core, full).only(far), index[far])
                for core in range(spec.cores)
            )
    count = np.zeros(len(index))
    kept: list[tuple[Ints, Ints]] = []
    for paths, who in options:
        if not len(who):
            continue
        links = links_of(fabric, connections.src_nic[who], connections.dst_nic[who], paths)
        whole = np.where(links >= 0, fabric.alive[links], True).all(1)
        kept.append((links[whole], who[whole]))
        count += np.bincount(who[whole], minlength=len(index))
    if (count == 0).any():
        return 0.0
    if spec.cores and evenly:
        from_pod = np.asarray(fabric.pod_of_leaf(fabric.leaf(connections.src_nic, 0)))
        to_pod = np.asarray(fabric.pod_of_leaf(fabric.leaf(connections.dst_nic, 0)))
        cores = np.arange(spec.cores)
        for links, who in kept:
            who = who[from_pod[who] != to_pod[who]]
            if not len(who):
                continue
            spine = int((links[0, 1] - fabric.leaf_up(0, 0)) % spec.spines)
            part = connections.demand[who] / count[who] / spec.cores
            for pod in range(spec.pods):
                load[fabric.core_up(pod, spine, cores)] += part[from_pod[who] == pod].sum()
                load[fabric.core_down(pod, spine, cores)] += part[to_pod[who] == pod].sum()
    for links, who in kept:
        share = np.repeat(connections.demand[who] / count[who], links.shape[1])
        flat = links.ravel()
        load += np.bincount(flat[flat >= 0], share[flat >= 0], minlength=fabric.links)
    used = load > 0
    return float((fabric.capacity[used] / load[used]).min())


def _commodities(fabric: Fabric, connections: Connections) -> tuple[Ints, Ints, Floats]:
    """Connections between the same two racks are one commodity: (source rack, target rack, demand)."""
    over = ~is_local(fabric, connections.src_nic, connections.dst_nic)
    racks = fabric.spec.leaves // fabric.spec.ports_per_nic
    key = fabric.rack(connections.src_nic[over]) * racks + fabric.rack(connections.dst_nic[over])
    kinds, place = np.unique(key, return_inverse=True)
    total: Floats = np.bincount(place, connections.demand[over], minlength=len(kinds)).astype(np.float64)
    return (kinds // racks).astype(np.int64), (kinds % racks).astype(np.int64), total


def _variables(fabric: Fabric, connections: Connections) -> int:
    return 2 * len(_commodities(fabric, connections)[0]) * fabric.spec.ports_per_nic * fabric.spec.spines


def lp_bound(fabric: Fabric, connections: Connections) -> float:
    """The optimum of the linear program, commodities between racks (which loses nothing above the leaves).

    Variables: for each commodity, port and spine the rate up and the rate down; for each pair of pods, spine and core the rate
    across. A spine takes and gives the same; at most the capacity on every link. NICs' own limits are those of ``cut_bound``.

    Raises:
        PathError: the solver gave up.
    """
    spec = fabric.spec
    ceiling = cut_bound(fabric, connections)
    source, target, demand = _commodities(fabric, connections)
    count = len(source)
    if count == 0:
        return ceiling
    ports, spines, cores = spec.ports_per_nic, spec.spines, spec.cores
    per = ports * spines
    source_pod = np.asarray(fabric.pod_of_leaf(source * ports))
    target_pod = np.asarray(fabric.pod_of_leaf(target * ports))
    far = np.flatnonzero(source_pod != target_pod)
    pairs, pair_of = np.unique(source_pod[far] * spec.pods + target_pod[far], return_inverse=True)
    up0, down0, core0 = 0, count * per, 2 * count * per
    rate = core0 + len(pairs) * spines * cores
    variables = rate + 1
    k, p, s = (
        grid.ravel() for grid in np.meshgrid(np.arange(count), np.arange(ports), np.arange(spines), indexing="ij")
    )
    up_column, down_column = up0 + (k * ports + p) * spines + s, down0 + (k * ports + p) * spines + s
    rows, columns, values = [], [], []

    def add(row: Ints, column: Ints, value: float | Floats) -> None:
        rows.append(np.asarray(row))
        columns.append(np.asarray(column))
        values.append(np.broadcast_to(np.asarray(value, float), np.shape(row)))

    # equalities: all of a commodity goes up; each spine (or, across pods, each spine plane) passes on what it takes
    every = np.arange(count)
    add(k, up_column, 1.0)
    add(every, np.full(count, rate), -demand)
    spine_row = count + k * spines + s
    add(spine_row, up_column, 1.0)
    add(spine_row, down_column, -1.0)
    equal_rows = count + count * spines
    if len(far):
        in_pair = np.full(count, -1)
        in_pair[far] = pair_of
        crosses = in_pair[k] >= 0
        add(equal_rows + in_pair[k[crosses]] * spines + s[crosses], up_column[crosses], 1.0)
        q, plane, core = (
            g.ravel() for g in np.meshgrid(np.arange(len(pairs)), np.arange(spines), np.arange(cores), indexing="ij")
        )
        core_column = core0 + (q * spines + plane) * cores + core
        add(equal_rows + q * spines + plane, core_column, -1.0)
        equal_rows += len(pairs) * spines
    equal = sparse.csr_array(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(equal_rows, variables)
    )
    rows, columns, values = [], [], []
    add(fabric.leaf_up(source[k] * ports + p, s), up_column, 1.0)
    add(fabric.leaf_down(target[k] * ports + p, s), down_column, 1.0)
    if len(far):
        add(fabric.core_up(pairs[q] // spec.pods, plane, core), core_column, 1.0)
        add(fabric.core_down(pairs[q] % spec.pods, plane, core), core_column, 1.0)
    limit = sparse.csr_array(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(fabric.links, variables)
    )
    used = np.flatnonzero(np.diff(limit.indptr))
    cost = np.zeros(variables)
    cost[rate] = -1.0
    bounds = np.zeros((variables, 2))
    bounds[:, 1] = np.inf
    bounds[rate, 1] = ceiling
    solved = optimize.linprog(
        cost, A_ub=limit[used], b_ub=fabric.capacity[used], A_eq=equal, b_eq=np.zeros(equal_rows), bounds=bounds,
        method="highs",
    )  # fmt: skip
    if solved.status != 0:
        raise PathError(f"The linear program of the bound was not solved: {solved.message}")
    return float(-solved.fun)


def common_rate(fabric: Fabric, connections: Connections, flow_connection: Ints, weight: Floats, links: Ints) -> float:
    """The greatest rate that all connections can have at once over these flows with these shares."""
    if not len(connections):
        return fabric.spec.nic_cap_gbps
    flow_load = connections.demand[flow_connection] * weight
    matrix = load_matrix(np.zeros(len(flow_load), np.int64), flow_load, links, 1, fabric.links)
    load = np.asarray(matrix.sum(0)).ravel()
    used = load > 1e-12
    return float((fabric.capacity[used] / load[used]).min())
