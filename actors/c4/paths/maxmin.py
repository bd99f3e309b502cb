"""Max-min fair rates of coupled flows over capacitated links, vectorised.

What shares a link is an entity: one flow, or the flows of one channel of a collective, which advance together (a ring is as fast
as its slowest connection). Entity e with rate x_e puts ``load[e, l] * x_e`` on link l.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from actors.c4.paths.errors import PathError
from actors.c4.paths.topology import Floats, Ints


def load_matrix(entity: Ints, weight: Floats, links: Ints, entities: int, link_count: int) -> sparse.csr_array:
    """[entities, links]: what one unit of each entity's rate puts on each link.

    Args:
        entity: [F], the entity of each flow.
        weight: [F], the flow's share of the entity's rate.
        links: [F, K], links along each flow's path, -1 for none.
    """
    rows = np.repeat(entity, links.shape[1])
    values = np.repeat(weight, links.shape[1])
    columns = links.ravel()
    used = (columns >= 0) & (values > 0)
    matrix = sparse.coo_array((values[used], (rows[used], columns[used])), shape=(entities, link_count))
    return matrix.tocsr()


def max_min(load: sparse.csr_array, capacity: Floats, limit: Floats | None = None) -> Floats:
    """[entities]: the max-min fair rates.

    In each round every link that is the tightest for all of its undecided entities is filled: its share can never rise or fall
    again, because shares elsewhere are no smaller and only grow as entities are decided. So many links are filled at once,
    and the result is that of progressive filling (Bertsekas and Gallager, Data Networks, section 6.5.2).

    Args:
        load: [entities, links], not negative.
        capacity: [links].
        limit: [entities], an own ceiling of each; None for none.

    Raises:
        PathError: an entity that nothing limits.
    """
    entities, links = load.shape
    limits = np.full(entities, np.inf) if limit is None else np.asarray(limit, float)
    rates = np.zeros(entities)
    row = np.repeat(np.arange(entities), np.diff(load.indptr))
    column, value = load.indices.astype(np.int64), load.data.astype(float)
    left = np.asarray(capacity, float).copy()
    tolerance = 1e-12 * max(1.0, float(left.max(initial=0.0)))
    undecided = np.ones(entities, bool)
    while undecided.any():
        weight = np.bincount(column, value, minlength=links)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(weight > 0, np.maximum(left, 0.0) / weight, np.inf)
        tightest = limits.copy()
        np.minimum.at(tightest, row, share[column])
        if not np.isfinite(tightest[undecided]).all():
            raise PathError("A flow has neither a link nor a limit that bounds its rate.")
        slack = tolerance + 1e-12 * tightest
        # a link decides when it is the tightest of every undecided entity on it
        decides = np.zeros(links, bool)
        decides[column] = True
        looser = share[column] > tightest[row] + slack[row]
        decides[column[looser]] = False
        now = undecided & (limits <= tightest + slack)
        now[row[decides[column]]] = True
        if not now.any():  # rounding only: fill the tightest link of all
            now = undecided & (tightest <= tightest[undecided].min() + slack)
        rates[now] = tightest[now]
        gone = now[row]
        left -= np.bincount(column[gone], value[gone] * rates[row[gone]], minlength=links)
        row, column, value = row[~gone], column[~gone], value[~gone]
        undecided &= ~now
    return rates
