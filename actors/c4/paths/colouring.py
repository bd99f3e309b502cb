"""Spreading flows over spines without collision: edge colouring of the bipartite multigraph of source and destination leaves.

A spine is a colour. By König's theorem a bipartite multigraph of greatest degree D can be coloured with D colours so that
none meets
itself at a node; so in a Clos of S spines with K flows a link, every pattern with at most S * K flows a leaf has a plan in
which no
link carries more than K (Clos networks are rearrangeably non-blocking). Found by exchanging alternating (Kempe) chains.
"""

from __future__ import annotations

import numpy as np

from actors.c4.paths.topology import Bools, Ints

_FREE, _BLOCKED = -1, -2
_PAIRS = 12
"""Pairs of colours whose chains are tried before an edge is left over; without blocked slots the first always works."""


def colour_edges(source: Ints, target: Ints, up: Bools, down: Bools, slots: int) -> Ints:
    """[E]: the spine of each flow, -1 for a flow that found none (only where links are missing, or slots too few).

    Args:
        source: [E], node on the left, a row of ``up``.
        target: [E], node on the right, a row of ``down``.
        up: [left nodes, spines], the link from the left node to the spine may be used.
        down: [right nodes, spines].
        slots: flows that a link takes.
    """
    spines = up.shape[1]
    colours = spines * slots  # colour = slot * spines + spine: low colours first spreads a leaf's flows over all spines
    left, right = _table(up, slots), _table(down, slots)
    free_left = [_mask(row) for row in left]
    free_right = [_mask(row) for row in right]
    ends = list(zip(source.tolist(), target.tolist(), strict=True))
    colour = [_FREE] * len(ends)

    def put(edge: int, chosen: int) -> None:
        u, v = ends[edge]
        left[u][chosen] = right[v][chosen] = edge
        free_left[u] &= ~(1 << chosen)
        free_right[v] &= ~(1 << chosen)
        colour[edge] = chosen

    def chain(v: int, a: int, b: int) -> list[int] | None:
        """Edges coloured a, b, a, ... from the right node v; None when exchanging them would need a missing link."""
        found: list[int] = []
        edge = right[v][a]
        while True:
            found.append(edge)
            edge = left[ends[edge][0]][b]
            if edge < 0:
                return found if edge == _FREE else None
            found.append(edge)
            edge = right[ends[edge][1]][a]
            if edge < 0:
                return found if edge == _FREE else None

    def exchange(edges: list[int], a: int, b: int) -> None:
        for edge in edges:
            u, v = ends[edge]
            left[u][colour[edge]] = right[v][colour[edge]] = _FREE
            free_left[u] |= 1 << colour[edge]
            free_right[v] |= 1 << colour[edge]
        for edge in edges:
            put(edge, b if colour[edge] == a else a)

    for edge, (u, v) in enumerate(ends):
        common = free_left[u] & free_right[v]
        if common:
            put(edge, (common & -common).bit_length() - 1)
            continue
        tried = 0
        for a in _bits(free_left[u], colours):
            done = False
            for b in _bits(free_right[v], colours):
                tried += 1
                if tried > _PAIRS:
                    break
                # right[v][a] is an edge unless that link is missing
                edges = chain(v, a, b) if right[v][a] >= 0 else None
                if edges is not None:
                    exchange(edges, a, b)
                    put(edge, a)
                    done = True
                    break
            if done or tried > _PAIRS:
                break
    found = np.asarray(colour, np.int64)
    return np.where(found >= 0, found % spines, -1)


def _table(usable: Bools, slots: int) -> list[list[int]]:
    row_of = np.where(np.tile(usable, (1, slots)), _FREE, _BLOCKED)
    rows: list[list[int]] = row_of.tolist()
    return rows


def _mask(row: list[int]) -> int:
    return sum(1 << place for place, value in enumerate(row) if value == _FREE)


def _bits(mask: int, count: int) -> list[int]:
    return [place for place in range(count) if mask >> place & 1]
