"""After a failure: new paths for the flows that lost theirs, new shares around them, and everything else left alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from actors.c4.paths.bound import cut_bound
from actors.c4.paths.errors import UnreachableError
from actors.c4.paths.plan import GOOD_ENOUGH, Plan, neighbourhoods, passable, split_over
from actors.c4.paths.routing import NONE, Paths, links_of
from actors.c4.paths.topology import Bools, Fabric, Floats, Ints

_ROUNDS = 4


@dataclass(frozen=True)
class Replanned:
    """A plan for the fabric as it is now."""

    plan: Plan
    moved: Bools
    """[F]: flows with another path than before; a change of shares alone moves nothing."""

    @property
    def moved_fraction(self) -> float:
        return float(self.moved.mean()) if len(self.moved) else 0.0


def replan(fabric: Fabric, plan: Plan, most_moved: float = 0.15) -> Replanned:
    """The plan repaired.

    Args:
        fabric: with the failures.
        plan: for the fabric before.
        most_moved: share of all flows that may move; those on dead links always do.

    Raises:
        UnreachableError: two NICs are cut apart.
    """
    links = plan.links(fabric)
    dead = np.where(links >= 0, ~fabric.alive[links], False).any(1)
    if not dead.any():
        return Replanned(plan, dead)
    room = int(most_moved * len(plan)) - int(dead.sum())
    repaired = plan
    for chosen in neighbourhoods(fabric, plan, dead):
        within = np.isin(plan.flow_connection, chosen)
        repaired, extra = _repaired(fabric, repaired, chosen, dead & within, max(0, room))
        room -= extra
    return Replanned(repaired, ~repaired.paths.same(plan.paths))


def _repaired(fabric: Fabric, plan: Plan, chosen: Ints, dead: Bools, room: int) -> tuple[Plan, int]:
    """The plan with the ``dead`` flows of the ``chosen`` connections on new paths; at most ``room`` others moved; how many."""
    bound = cut_bound(fabric, plan.connections)
    within = np.isin(plan.flow_connection, chosen)
    best = _reshared(fabric, _dead_placed(fabric, plan, chosen, dead), chosen)
    extra = 0
    for _ in range(_ROUNDS):
        rate = _local_rate(fabric, best, within)
        if rate >= GOOD_ENOUGH * bound or extra >= room:
            break
        moved, count = _others_moved(fabric, best, chosen, room - extra)
        if not count:
            break
        tried = _reshared(fabric, moved, chosen)
        if _local_rate(fabric, tried, within) <= rate * (1 + 1e-6):
            break
        best, extra = tried, extra + count
    return best, extra


def _local_rate(fabric: Fabric, plan: Plan, within: Bools) -> float:
    """The common rate that the links of these flows allow."""
    links = plan.links(fabric)[within]
    used = np.unique(links[links >= 0])
    load = plan.load(fabric)[used]
    busy = load > 1e-12
    return float((fabric.capacity[used][busy] / load[busy]).min())


def _reshared(fabric: Fabric, plan: Plan, chosen: Ints) -> Plan:
    within = np.isin(plan.flow_connection, chosen)
    weight = plan.weight.copy()
    weight[within] = split_over(
        fabric, plan, chosen, plan.flow_connection[within], plan.links(fabric)[within], np.zeros(int(within.sum()))
    )
    better = replace(plan, weight=weight)
    return better if _local_rate(fabric, better, within) >= _local_rate(fabric, plan, within) else plan


def _with_options(fabric: Fabric, plan: Plan, chosen: Ints, kept: Bools, options: _Options) -> tuple[Floats, Floats]:
    """Best shares of (kept flows, options) of the chosen connections."""
    connection = np.concatenate([plan.flow_connection[kept], options.connection])
    links = np.concatenate([plan.links(fabric)[kept], options.links])
    count = int(kept.sum())
    cost = np.concatenate([np.zeros(count), np.ones(len(options.connection))])
    share = split_over(fabric, plan, chosen, connection, links, cost)
    return share[:count], share[count:]


def _dead_placed(fabric: Fabric, plan: Plan, chosen: Ints, dead: Bools) -> Plan:
    """Each dead flow on the path that the linear program gives most to; among equals the emptiest."""
    within = np.isin(plan.flow_connection, chosen)
    movers = np.flatnonzero(dead)
    options = _options(fabric, plan, np.unique(plan.flow_connection[movers]))
    _, share = _with_options(fabric, plan, chosen, within & ~dead, options)
    load = plan.load(fabric)
    arrays = [array.copy() for array in _arrays(plan.paths)]
    for connection in np.unique(plan.flow_connection[movers]):
        mine = np.flatnonzero(options.connection == connection)
        flows = movers[plan.flow_connection[movers] == connection]
        wanted = np.round(share[mine], 6)
        taken = np.zeros(len(mine), bool)
        for flow in flows:
            fullness = np.where(options.links[mine] >= 0, load[options.links[mine]], 0.0)[:, 1:5].max(1)
            place = int(np.lexsort((fullness, -wanted, taken))[0])
            taken[place] = True
            _move(arrays, int(flow), options, int(mine[place]))
            hop = options.links[mine[place]]
            load[hop[hop >= 0]] += plan.connections.demand[connection] * plan.weight[flow]
    return replace(plan, paths=Paths(*arrays))


def _others_moved(fabric: Fabric, plan: Plan, chosen: Ints, room: int) -> tuple[Plan, int]:
    """Flows of full links exchanged for paths that the linear program asks for; each connection gives up what it uses least."""
    within = np.isin(plan.flow_connection, chosen)
    load = plan.load(fabric) / np.maximum(fabric.capacity, 1e-12)
    inner = plan.links(fabric)
    full = load >= load[inner[within][inner[within] >= 0]].max() * (1 - 1e-6)
    hot = within & np.where(inner[:, 1:5] >= 0, full[inner[:, 1:5]], False).any(1)
    connections = np.unique(plan.flow_connection[hot])
    if not len(connections):
        return plan, 0
    options = _options(fabric, plan, connections)
    kept_share, share = _with_options(fabric, plan, chosen, within, options)
    share_of = np.full(len(plan), np.inf)
    share_of[within] = kept_share
    arrays = [array.copy() for array in _arrays(plan.paths)]
    count = 0
    for pick in np.argsort(-share, kind="stable"):
        if share[pick] < 1e-3 or count >= room:
            break
        mine = np.flatnonzero(plan.flow_connection == options.connection[pick])
        flow = mine[share_of[mine].argmin()]
        if share_of[flow] >= share[pick]:
            continue
        _move(arrays, int(flow), options, int(pick))
        share_of[flow] = np.inf
        count += 1
    return replace(plan, paths=Paths(*arrays)), count


def _move(arrays: list[Ints], flow: int, options: _Options, pick: int) -> None:
    for array, chosen in zip(arrays, _arrays(options.paths), strict=True):
        array[flow] = chosen[pick]


@dataclass(frozen=True)
class _Options:
    connection: Ints
    paths: Paths
    links: Ints


def _options(fabric: Fabric, plan: Plan, connections: Ints) -> _Options:
    """Every path that these connections could take (one core each: the emptiest), like ports to like where possible."""
    load = plan.load(fabric)
    ports, rows = fabric.spec.ports_per_nic, []
    for connection in connections:
        src, dst = plan.connections.src_nic[[connection]], plan.connections.dst_nic[[connection]]
        taken = plan.flow_connection == connection
        local = bool(fabric.rack(src[0]) == fabric.rack(dst[0]))
        found: list[tuple[int, int, int, int]] = []
        for straight in (True, False):
            for tx in range(ports):
                for rx in range(ports):
                    if (tx == rx) != straight or (local and tx != rx):
                        continue
                    usable = np.flatnonzero(passable(fabric, src, dst, tx, rx)[0])
                    if local:
                        found += [(tx, NONE, NONE, rx)] if len(usable) else []
                        continue
                    found += [(tx, int(s), _core(fabric, load, src[0], dst[0], int(s)), rx) for s in usable]
            if found:
                break
        if not found:
            raise UnreachableError(f"Failures have left no path from NIC {src[0]} to NIC {dst[0]}.")
        kept = set(zip(*(array[taken].tolist() for array in _arrays(plan.paths)), strict=True))
        # two queue pairs of a connection on one path add nothing
        rows += [(int(connection), *path) for path in ([p for p in found if p not in kept] or found)]
    table = np.asarray(rows, np.int64)
    paths = Paths(table[:, 1], table[:, 2], table[:, 3], table[:, 4])
    sources, targets = plan.connections.src_nic[table[:, 0]], plan.connections.dst_nic[table[:, 0]]
    return _Options(table[:, 0], paths, links_of(fabric, sources, targets, paths))


def _core(fabric: Fabric, load: Floats, src: int, dst: int, spine: int) -> int:
    from_pod, to_pod = int(fabric.pod_of_leaf(fabric.leaf(src, 0))), int(fabric.pod_of_leaf(fabric.leaf(dst, 0)))
    if not fabric.spec.cores or from_pod == to_pod:
        return NONE
    core = np.arange(fabric.spec.cores)
    usable = fabric.core_up_alive[from_pod, spine] & fabric.core_down_alive[to_pod, spine]
    full = np.maximum(load[fabric.core_up(from_pod, spine, core)], load[fabric.core_down(to_pod, spine, core)])
    return int(np.where(usable, full, np.inf).argmin())


def _arrays(paths: Paths) -> tuple[Ints, Ints, Ints, Ints]:
    return paths.tx, paths.spine, paths.core, paths.rx
