"""Communication slow: the delay matrix. A hot cell is a connection, a hot row its sender, a hot column its receiver.

The receiver's stamps (first byte to last byte of each message) make D[source][destination] in seconds per byte. A connection is
compared with its own past and with its like: same role, same size of group, and both ends on one node or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.c4.diagnosis.history import History
from actors.c4.diagnosis.layout import Layout, Places
from actors.c4.diagnosis.observation import BLOCK_OPS, Observation
from actors.c4.diagnosis.settings import DiagnosisSettings
from actors.c4.diagnosis.suspicion import Suspicion
from actors.c4.diagnosis.trend import trend_of
from actors.c4.diagnosis.verdict import FaultKind


@dataclass(frozen=True)
class _Cells:
    """C connections (source, destination), those of several groups taken together."""

    source: NDArray[np.int64]
    destination: NDArray[np.int64]
    across: NDArray[np.bool_]
    """Between nodes."""
    hot: NDArray[np.bool_]
    matters: NDArray[np.bool_]
    """Hot, and no trifle: it costs much, or has lasted long. Other hot cells only complete its line."""
    near: NDArray[np.bool_]
    decide_s: NDArray[np.float64]
    row: NDArray[np.int64]
    """The series that speaks for it: the hottest."""
    ratio: NDArray[np.float64]
    """That series' present over normal; 1 where it is not known."""

    def warm(self, members: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of ``members`` go with the hot ones among them: hot themselves, or raised by more than half as much.

        What lies in a line with hot cells needs less of a proof than a cell that is accused alone.
        """
        usual = float(np.median(self.ratio[members[self.hot[members]]]))
        return self.hot[members] | (self.ratio[members] > 1 + 0.6 * (usual - 1))


def connection_suspicions(
    history: History,
    layout: Layout,
    place: NDArray[np.int64],
    places: Places,
    intervals: NDArray[np.float64],
    step_s: float,
    now_s: float,
    settings: DiagnosisSettings,
) -> tuple[list[Suspicion], list[Suspicion]]:
    """Suspicions, and those to wait for a little: other cells of their row or column have had no time to show themselves.

    Args:
        history: series (group, source, destination) of (seconds per byte, bytes per operation).
        place: [series]: index of the series' group in ``layout``; -1 when the job has it no more.
        intervals: [G]: seconds from one operation of a group to the next.
    """
    keep = np.flatnonzero(place >= 0)
    if not len(keep):
        return [], []
    kept, group = history.chosen(keep), place[keep]
    source, destination = kept.first, kept.second
    interval = intervals[group]
    across = places.node[source] != places.node[destination]
    label = np.unique(
        (layout.role[group] * (int(layout.size.max(initial=0)) + 1) + layout.size[group]) * 2 + across,
        return_inverse=True,
    )[1].reshape(-1)
    delay, block = kept.by_age(0, label)
    per_op = kept.latest(1).astype(np.float64)
    floor = settings.share_floor * np.nan_to_num(interval) / np.maximum(per_op, 1.0)
    trend = trend_of(delay, block, BLOCK_OPS * interval, label, layout.role[group], floor, step_s, settings, True)
    dear = (trend.present - trend.normal) * per_op >= settings.quick_share * np.nan_to_num(interval)
    matters = trend.slow & (dear | trend.lasting)
    if not matters.any():
        return [], []
    cells = _cells(source, destination, across, trend, matters, layout.world)
    ready: list[Suspicion] = []
    waiting: list[Suspicion] = []
    for kind, members, settled in _explain(cells, trend, places, now_s, interval):
        rows = cells.row[members]
        one = _suspicion(kind, members, rows, cells, trend, interval, layout, group, places, now_s)
        (ready if settled else waiting).append(one)
    return ready, waiting


def _cells(source, destination, across, trend, matters, world) -> _Cells:  # type: ignore[no-untyped-def]
    pair, inverse = np.unique(source * world + destination, return_inverse=True)
    inverse = inverse.reshape(-1)
    count = len(pair)
    hot, dear, near = (np.zeros(count, dtype=bool) for _ in range(3))
    np.logical_or.at(hot, inverse, trend.slow)
    np.logical_or.at(dear, inverse, matters)
    np.logical_or.at(near, inverse, trend.near)
    decide = np.full(count, np.inf)
    np.minimum.at(decide, inverse, trend.decide_s)
    row = np.zeros(count, dtype=np.int64)
    ratio = np.nan_to_num(trend.ratio, nan=1.0)
    heat = ratio + 1e6 * trend.slow
    order = np.argsort(heat, kind="stable")
    row[inverse[order]] = order
    where = np.zeros(count, dtype=bool)
    where[inverse] = across
    return _Cells(pair // world, pair % world, where, hot, dear, near & ~hot, decide, row, ratio[row])


def _explain(cells, trend, places, now_s, interval):  # type: ignore[no-untyped-def]
    """The fewest rows and columns that hold all hot cells: yields (kind, cells, settled) of those that matter.

    Lines are tried from large to small: a node's, then a rank's; a line of a single cell says no more than the cell.
    """
    left = cells.hot.copy()
    lines: list[tuple[FaultKind, NDArray[np.int64]]] = []
    for by_node in (True, False):
        for kind, end in ((FaultKind.SENDER_SLOW, cells.source), (FaultKind.RECEIVER_SLOW, cells.destination)):
            # Connections inside a node do not pass its network card.
            scopes = [cells.across] if by_node else [cells.across, ~cells.across]
            for scope in scopes:
                keys = places.node[end] if by_node else end
                for key in np.unique(keys[cells.hot & scope]):
                    members = np.flatnonzero(scope & (keys == key))
                    several = len(np.unique(end[members])) > 1
                    if len(members) > 1 and (several or not by_node):
                        lines.append((kind, members))
    lines.sort(key=lambda line: -int(cells.hot[line[1]].sum()))
    undecided = np.zeros(len(left), dtype=bool)
    for kind, members in lines:
        if int(left[members].sum()) < 2:
            continue
        hot = members[cells.hot[members]]
        began = max(float(trend.streak[row] * BLOCK_OPS * interval[row]) for row in cells.row[hot])
        young = ~cells.hot[members] & ((cells.decide_s[members] > began) | cells.near[members])
        if cells.warm(members).all() or (len(members) >= 8 and len(hot) >= 0.85 * len(members)):
            if cells.matters[members].any():
                yield kind, members, not undecided[members].any()
            left[members] = False
        elif len(hot) + int(young.sum()) == len(members):
            undecided[members] = True  # whatever lies in it may turn out to be a part of it
    for cell in np.flatnonzero(left & cells.matters):
        yield FaultKind.LINK_SLOW, np.array([cell]), not undecided[cell] and not _young(cells, trend, interval, cell)


def _young(cells, trend, interval, cell) -> bool:  # type: ignore[no-untyped-def]
    """Whether all the other cells of its row, or of its column, are still too young to be called healthy."""
    row = cells.row[cell]
    began = float(trend.streak[row] * BLOCK_OPS * interval[row])
    for end in (cells.source, cells.destination):
        others = np.flatnonzero(
            (end == end[cell]) & (cells.across == cells.across[cell]) & (np.arange(len(end)) != cell)
        )
        if len(others) and (cells.hot[others] | cells.near[others] | (cells.decide_s[others] > began)).all():
            return True
    return False


def _suspicion(kind, members, rows, cells, trend, interval, layout, group, places, now_s) -> Suspicion:  # type: ignore[no-untyped-def]
    ratio = float(np.median(trend.ratio[rows]))
    hottest = rows[int(np.argmax(trend.ratio[rows]))]
    name = layout.groups[group[hottest]].name
    onset = now_s - float(np.max(trend.streak[rows] * BLOCK_OPS * interval[rows]))
    confidence = float(np.clip(0.7 + 0.3 * (ratio - 1.0), 0.7, 0.98))
    pairs = [(int(cells.source[cell]), int(cells.destination[cell])) for cell in members]
    now, usual = (1e3 * 2**20 * float(one[hottest]) for one in (trend.present, trend.normal))
    numbers = f"{now:.3g} ms per MiB where {usual:.3g} is normal ({ratio:.2f} x)"
    if kind is FaultKind.LINK_SLOW:
        said = [
            f"Connection {pairs[0][0]}->{pairs[0][1]} in group {name!r} takes {numbers}, "
            f"over {int(trend.streak[hottest])} blocks."
        ]
        if np.isfinite(trend.like[hottest]):
            said.append(f"Its like take {trend.like[hottest] * 2**20 * 1e3:.3g} ms per MiB.")
        return Suspicion(kind, tuple(said), confidence, onset, (), pairs[0], name, 0, max(1.0, ratio))
    sends = kind is FaultKind.SENDER_SLOW
    ends = sorted({pair[0] if sends else pair[1] for pair in pairs})
    if len(ends) > 1:
        ranks = tuple(np.flatnonzero(places.node == places.node[ends[0]]).tolist())
        who = f"node {places.names[places.node[ends[0]]]}"
    else:
        ranks, who = (ends[0],), f"rank {ends[0]}"
    what = "sends" if sends else "receives"
    shown = ", ".join(f"{a}->{b}" for a, b in pairs[:4]) + (" ..." if len(pairs) > 4 else "")
    said = [
        f"All {len(pairs)} observed connections over which {who} {what} are slow ({shown}).",
        f"The hottest takes {numbers}.",
    ]
    return Suspicion(kind, tuple(said), confidence, onset, ranks, None, name, 0, max(1.0, ratio), cells=tuple(pairs))


def delay_matrix(observation: Observation, world: int | None = None) -> NDArray[np.float64]:
    """[R, R]: seconds per MiB from source (row) to destination (column), over the observation's blocks; nan where unobserved."""
    rows = observation.link_blocks
    size = world if world is not None else 1 + int(max(rows.source.max(initial=-1), rows.destination.max(initial=-1)))
    seconds, amount = np.zeros((size, size)), np.zeros((size, size))
    np.add.at(seconds, (rows.source, rows.destination), rows.transfer_s.astype(np.float64))
    np.add.at(amount, (rows.source, rows.destination), rows.bytes.astype(np.float64))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(amount > 0, seconds / amount * 2**20, np.nan)
