"""How a connection's data is shared out over its queue pairs: the planner's linear program, and the controller on the move."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize, sparse

from actors.c4.paths.errors import PathError
from actors.c4.paths.maxmin import load_matrix
from actors.c4.paths.topology import Fabric, Floats, Ints

_MOVE_COST = 1e-5


@dataclass(frozen=True)
class Split:
    """An optimal split of the connections' data over the options that they were given."""

    rate_gbps: float
    """The common rate, for a demand of 1."""
    share: Floats
    """[options]: of the connection's data; each connection's sum is 1."""


def best_split(
    fabric: Fabric, owner: Ints, demand: Floats, links: Ints, fixed_load: Floats, ceiling_gbps: float, cost: Floats
) -> Split:
    """The shares with which the common rate of all connections is greatest (linear program, HiGHS).

    Args:
        owner: [O], the connection (0 .. C-1) of each option.
        demand: [C], rate of each connection for a common rate of 1.
        links: [O, K], of each option, -1 for none.
        fixed_load: [links], of all other flows for a common rate of 1; only links on the options' paths count.
        ceiling_gbps: never above this rate.
        cost: [O], options with a higher one are used only where they help.

    Raises:
        PathError: a connection without option; the solver gave up.
    """
    options, count = len(owner), len(demand)
    if (np.bincount(owner, minlength=count) == 0).any():
        raise PathError("A connection has no path left.")
    matrix = load_matrix(np.arange(options), np.ones(options), links, options, fabric.links).T.tocsr()
    matters = np.flatnonzero(np.diff(matrix.indptr) > 0)
    limit = sparse.hstack([matrix[matters], sparse.csr_array(fixed_load[matters][:, None])], format="csr")
    sums = sparse.coo_array((np.ones(options), (owner, np.arange(options))), shape=(count, options))
    equal = sparse.hstack([sums, sparse.csr_array(-demand[:, None])], format="csr")
    objective = np.append(_MOVE_COST * cost, -1.0)
    bounds = np.zeros((options + 1, 2))
    bounds[:, 1] = np.inf
    bounds[options, 1] = ceiling_gbps
    solved = optimize.linprog(
        objective, A_ub=limit, b_ub=fabric.capacity[matters], A_eq=equal, b_eq=np.zeros(count), bounds=bounds,
        method="highs-ds",
    )  # fmt: skip
    if solved.status != 0:
        raise PathError(f"The linear program of the shares was not solved: {solved.message}")
    rate = float(solved.x[options])
    total = np.bincount(owner, solved.x[:options], minlength=count)
    even = 1.0 / np.bincount(owner, minlength=count)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(total[owner] > 0, solved.x[:options] / total[owner], even[owner])
    return Split(rate, share)


def near_best_split(
    fabric: Fabric, owner: Ints, demand: Floats, links: Ints, fixed_load: Floats, cost: Floats, rounds: int = 400
) -> Split:
    """As ``best_split``, by multiplicative weights instead of a solver: within about a percent, at any size, in seconds.

    Minimises the greatest utilisation: links are priced by a soft maximum that sharpens, and each connection moves data to its
    cheaper options (Arora, Hazan, Kale 2012). Arguments as for ``best_split``.

    Raises:
        PathError: a connection without a living option.
    """
    count = len(demand)
    usable = np.where(links >= 0, fabric.alive[links], True).all(1)
    # where an option costs a move, it starts with a tenth
    share = np.where(usable, np.where(cost > 0, 0.1, 1.0), 0.0)
    total = np.bincount(owner, share, minlength=count)
    if count and total.min() <= 0:
        raise PathError("A connection has no path left.")
    share /= total[owner]
    matrix = load_matrix(np.arange(len(owner)), np.ones(len(owner)), links, len(owner), fabric.links)
    matters = np.flatnonzero((np.bincount(matrix.indices, minlength=fabric.links) > 0) & fabric.alive)
    matrix = matrix[:, matters].tocsr()
    back = matrix.T.tocsr()
    capacity, fixed = fabric.capacity[matters], fixed_load[matters]
    best, best_share = np.inf, share
    for step in range(rounds):
        part = step / rounds
        use = (back @ (share * demand[owner]) + fixed) / capacity
        top = float(use.max(initial=0.0))
        if top < best:
            best, best_share = top, share
        price = np.exp((20.0 + 480.0 * part) * (use / top - 1.0)) / capacity
        dear = matrix @ price
        dear = dear / max(float(dear.max()), 1e-300)
        moved = share * np.exp(-(0.4 - 0.36 * part) * dear)
        share = moved / np.bincount(owner, moved, minlength=count)[owner]
    return Split(1.0 / best if best > 0 else np.inf, best_share)


def rebalanced(weight: Floats, flow_connection: Ints, completion_s: Floats, gain: float = 0.5) -> Floats:
    """[F]: new shares after the flows' last messages took ``completion_s``: slower ones get less (C4P's dynamic balancing).

    A flow's speed is its share over its time; were speeds constant, shares in proportion to them would end together.
    ``gain`` damps
    the step, because other connections move at the same time. A flow without data keeps a hundredth, so that it is seen to
    recover.
    """
    if not 0 < gain <= 1:
        raise PathError(f"The gain must be above 0 and at most 1, not {gain}.")
    count = int(flow_connection.max()) + 1 if len(flow_connection) else 0
    speed = np.where(completion_s > 0, weight / np.maximum(completion_s, 1e-12), 0.0)
    total = np.bincount(flow_connection, speed, minlength=count)[flow_connection]
    wanted = np.where(total > 0, speed / np.where(total > 0, total, 1.0), weight)
    new = np.maximum(weight + gain * (wanted - weight), 0.01)
    return new / np.bincount(flow_connection, new, minlength=count)[flow_connection]
