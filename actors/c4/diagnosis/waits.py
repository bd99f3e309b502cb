"""Hangs that operations show: who has not entered what others wait in, who entered another operation, which bytes do not arrive.

The waits-for graph. A rank inside an operation waits for every rank of the group that has not entered it. A rank that is itself
inside an operation (of any group) is innocent: it is followed, not blamed. What remains are the roots: ranks inside
nothing (NEVER_ENTERED), and operations that all have entered and that do not end (a hang of communication).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.c4.diagnosis.layout import Layout, Places
from actors.c4.diagnosis.observation import LinkRows, Observation
from actors.c4.diagnosis.settings import DiagnosisSettings
from actors.c4.diagnosis.suspicion import Suspicion
from actors.c4.diagnosis.verdict import FaultKind
from actors.c4.recorder.records import ElementType, OpType

UNEVEN = (OpType.ALL_TO_ALL, OpType.GATHER, OpType.SCATTER, OpType.SEND, OpType.RECV, OpType.OTHER)
"""Ranks of one such operation may well state different sizes."""


@dataclass(frozen=True)
class _Stalls:
    """Groups in which somebody waits too long. By group index."""

    waits: NDArray[np.bool_]
    """[G]."""
    sequence: NDArray[np.int64]
    """[G]: the oldest operation that is waited in: what happens in it decides the rest."""
    longest_s: NDArray[np.float64]
    """[G]."""


def wait_suspicions(
    observation: Observation,
    layout: Layout,
    places: Places,
    doubtful: NDArray[np.bool_],
    hang_s: float,
    settings: DiagnosisSettings,
) -> list[Suspicion]:
    """Suspicions from operations; ``doubtful`` ranks [N] have been judged by their processes and excuse their groups."""
    progress = observation.progress
    if not len(progress.rank):
        return []
    known = places.report_age_s[progress.rank] <= settings.stale_report_s
    is_open = (progress.open_type > 0) & known
    waiting = progress.completed + 1
    inside = np.zeros(layout.world, dtype=bool)
    inside[progress.rank[is_open]] = True
    found = _mismatches(observation, layout, is_open, waiting, doubtful, hang_s, settings)
    wrong = {suspicion.group for suspicion in found}
    stalls = _stalls(observation, layout, is_open & (np.nan_to_num(progress.open_age_s) > hang_s), waiting)
    if not stalls.waits.any():
        return found
    late, missing = _laggards(observation, layout, places, stalls)
    found += _absent(observation, layout, stalls, late, missing, inside, doubtful, known, hang_s)
    entered_by_all = stalls.waits.copy()
    entered_by_all[late[1]] = False
    entered_by_all[missing[1]] = False
    entered_by_all &= layout.size > 1  # a receive from anybody has no group that one could ask
    excused = np.zeros(len(layout.groups), dtype=bool)
    excused[layout.member_group[doubtful[layout.member_rank]]] = True
    for group in np.flatnonzero(entered_by_all & ~excused):
        if layout.groups[group].name not in wrong:
            found += _stalled(observation, layout, stalls, int(group), is_open, waiting, hang_s)
    return found


def _stalls(observation: Observation, layout: Layout, aged: NDArray[np.bool_], waiting: NDArray[np.int64]) -> _Stalls:
    groups, progress = len(layout.groups), observation.progress
    sequence = np.full(groups, np.iinfo(np.int64).max)
    np.minimum.at(sequence, progress.group[aged], waiting[aged])
    longest = np.zeros(groups)
    np.maximum.at(longest, progress.group[aged], progress.open_age_s[aged].astype(np.float64))
    return _Stalls(longest > 0, sequence, longest)


def _laggards(
    observation: Observation, layout: Layout, places: Places, stalls: _Stalls
) -> tuple[tuple[NDArray, NDArray], tuple[NDArray, NDArray]]:
    """(ranks, groups) that have not entered the operation waited in; and those of whom no progress is known at all."""
    progress = observation.progress
    behind = stalls.waits[progress.group] & (progress.entered < stalls.sequence[progress.group])
    told = np.unique(progress.group.astype(np.int64) * layout.world + progress.rank)
    member = layout.member_group * layout.world + layout.member_rank
    silent = stalls.waits[layout.member_group] & ~np.isin(member, told)
    return (
        (progress.rank[behind].astype(np.int64), progress.group[behind].astype(np.int64)),
        (layout.member_rank[silent], layout.member_group[silent]),
    )


def _absent(observation, layout, stalls, late, missing, inside, doubtful, known, hang_s) -> list[Suspicion]:  # type: ignore[no-untyped-def]
    """Laggards that are inside nothing themselves: the roots."""
    progress, now = observation.progress, observation.at_s
    idle = np.full(layout.world, np.inf)
    np.minimum.at(idle, progress.rank, np.where(np.isnan(progress.idle_s), np.inf, progress.idle_s).astype(np.float64))
    rank_known = np.zeros(layout.world, dtype=bool)
    rank_known[progress.rank[known]] = True
    rank_known[observation.ranks.rank[observation.ranks.report_age_s < 0.5 * hang_s]] = True
    ranks, groups = np.concatenate([late[0], missing[0]]), np.concatenate([late[1], missing[1]])
    # Its idleness must be as old as the waiting: who has just come out of something was held up by others.
    blamed = ~inside[ranks] & ~doubtful[ranks] & rank_known[ranks] & (idle[ranks] > 0.5 * hang_s)
    found = []
    for rank in np.unique(ranks[blamed]):
        mine = groups[blamed & (ranks == rank)]
        group = int(mine[np.argmax(stalls.longest_s[mine])])
        entered = progress.entered[(progress.group == group) & (progress.rank == rank)]
        waiters = progress.rank[
            (progress.group == group) & (progress.open_type > 0) & (progress.completed + 1 == stalls.sequence[group])
        ]
        name, sequence = layout.groups[group].name, int(stalls.sequence[group])
        said = [
            f"Operation {sequence} of group {name!r} is waited in for {stalls.longest_s[group]:.2f} s by "
            f"{_some(waiters)}; rank {rank} has not entered it (its newest is {int(entered.max(initial=0))}).",
            f"Rank {rank} is inside no operation of any group"
            + (f", since {idle[rank]:.2f} s." if np.isfinite(idle[rank]) else " and has recorded none."),
        ]
        # The waiting began after the rank went missing; idle tells when it was last heard of, work included.
        onset = now - min(float(idle[rank]), float(stalls.longest_s[mine].max()))
        confidence = 0.95 if len(mine) > 1 or len(waiters) > 1 else 0.9
        found.append(
            Suspicion(
                FaultKind.NEVER_ENTERED, tuple(said), confidence, onset, (int(rank),), group=name, sequence=sequence
            )
        )
    return found


def _mismatches(observation, layout, is_open, waiting, doubtful, hang_s, settings) -> list[Suspicion]:  # type: ignore[no-untyped-def]
    """Ranks inside operations of one number that are not the same operation: the minority is the culprit."""
    progress, now = observation.progress, observation.at_s
    aged = is_open & (np.nan_to_num(progress.open_age_s) > min(settings.mismatch_floor_s, hang_s))
    rows = np.flatnonzero(aged)
    if len(rows) < 2:
        return []
    uneven = np.isin(progress.open_type[rows], UNEVEN)
    point = np.isin(progress.open_type[rows], (OpType.SEND, OpType.RECV))
    kind = np.where(point, OpType.SEND, progress.open_type[rows]).astype(np.int64)
    element = np.where(uneven, 0, progress.open_dtype[rows]).astype(np.int64)
    size = np.where(uneven, 0, progress.open_bytes[rows])
    place = np.stack([progress.group[rows].astype(np.int64), waiting[rows]])
    table = np.stack([*place, kind, element, size])
    shapes = np.unique(table, axis=1)
    at, counts = np.unique(shapes[:2], axis=1, return_counts=True)
    found = []
    for group, sequence in at[:, counts > 1].T:
        here = np.flatnonzero((place[0] == group) & (place[1] == sequence))
        ranks = progress.rank[rows[here]]
        if doubtful[ranks].any():
            continue
        votes: dict[tuple[int, ...], list[int]] = {}
        for column, rank in zip(table[2:, here].T, ranks, strict=True):
            votes.setdefault(tuple(int(value) for value in column), []).append(int(rank))
        # Until all have come, the majority may still be on its way.
        everyone = len(here) == layout.size[group]
        oldest = float(progress.open_age_s[rows[here]].max())
        if not everyone and oldest < hang_s:
            continue
        most = max(len(members) for members in votes.values())
        winners = [shape for shape, members in votes.items() if len(members) == most]
        culprits = sorted(
            rank for shape, members in votes.items() if shape not in winners or len(winners) > 1 for rank in members
        )
        youngest = float(progress.open_age_s[rows[here]].min())
        said = [f"Under number {sequence} of group {layout.groups[group].name!r} the ranks run different operations: "
                + "; ".join(f"{_some(members)} {_operation(*shape)}" for shape, members in votes.items()) + "."]  # fmt: skip
        behind = _behind(progress, int(group), culprits)
        if len(winners) > 1:
            said.append("No side has a majority: either may be the wrong one.")
        elif behind:
            said.append(f"{_some(behind)} entered fewer operations than the others: probably skipped one.")
        found.append(
            Suspicion(
                FaultKind.MISMATCHED_COLLECTIVE, tuple(said), 0.5 if len(winners) > 1 else 0.95,
                now - youngest, tuple(culprits), group=layout.groups[group].name, sequence=int(sequence),
            )
        )  # fmt: skip
    return found


def _behind(progress, group: int, ranks: list[int]) -> list[int]:  # type: ignore[no-untyped-def]
    rows = np.flatnonzero(progress.group == group)
    front = progress.entered[rows].max()
    late = rows[progress.entered[rows] < front]
    return [rank for rank in ranks if rank in set(progress.rank[late].tolist())]


def _stalled(observation, layout, stalls, group, is_open, waiting, hang_s) -> list[Suspicion]:  # type: ignore[no-untyped-def]
    """All have entered the oldest operation and it does not end: which connection has taken bytes and not delivered them?"""
    progress, now, sequence = observation.progress, observation.at_s, int(stalls.sequence[group])
    inside = (progress.group == group) & is_open & (waiting == sequence)
    since = float(progress.open_age_s[inside].min())
    if since <= 0.5 * hang_s:
        return []  # the last one came late: it has had no time yet
    name = layout.groups[group].name
    what = _operation(
        *(int(column[inside][0]) for column in (progress.open_type, progress.open_dtype, progress.open_bytes))
    )
    head = (
        f"All {int(layout.size[group])} ranks entered operation {sequence} of group {name!r} ({what}) "
        f"and it has not ended for {since:.2f} s."
    )
    links, moved, how = _stalled_links(observation.links, group, sequence, hang_s)
    if links is None:
        return []  # bytes still move
    if not links:
        ranks = tuple(sorted(int(rank) for rank in progress.rank[inside]))
        kind, pair = FaultKind.GROUP_STALLED, None
        if (
            layout.size[group] == 2
            and len(layout.groups[group].ranks) == 2
            and OpType(int(progress.open_type[inside][0])) in (OpType.SEND, OpType.RECV)
        ):
            # A point-to-point communicator has a single connection, from its first rank to its second.
            kind, pair, ranks = FaultKind.LINK_STALLED, layout.groups[group].ranks, ()
        return [Suspicion(kind, (head,), 0.85 if pair else 0.6, now - since, ranks, pair, name, sequence)]
    return [
        Suspicion(
            FaultKind.LINK_STALLED,
            (how[link], head),
            0.95 if len(links) == 1 else 0.85,
            now - moved,
            (),
            link,
            name,
            sequence,
        )
        for link in links
    ]


def _stalled_links(
    rows: LinkRows, group: int, sequence: int, hang_s: float
) -> tuple[list[tuple[int, int]] | None, float, dict[tuple[int, int], str]]:
    """(connections to blame; None while bytes still move), seconds since the last byte, sentences."""
    mine = np.flatnonzero((rows.group == group) & (rows.sequence == sequence))
    if not len(mine):
        return [], 0.0, {}
    still = float(rows.progress_age_s[mine].min())
    if still <= 0.5 * hang_s:
        return None, still, {}
    sent: dict[tuple[int, int], int] = {}
    received: dict[tuple[int, int], int] = {}
    for row in mine:
        link = (int(rows.source[row]), int(rows.destination[row]))
        if rows.sent_messages[row] >= 0:
            sent[link] = int(rows.sent_messages[row])
        if rows.received_messages[row] >= 0:
            received[link] = int(rows.received_messages[row])
    gap = {link: sent[link] - received.get(link, 0) for link in sent if link in received}
    open_gaps = [link for link, count in gap.items() if count > 0]
    if open_gaps:
        # Upstream of a stalled connection messages may pile up in a buffer: they have been taken from their sender, too.
        how = {
            link: f"Rank {link[0]} has begun to send {sent[link]} messages over {link[0]}->{link[1]}, "
            f"rank {link[1]} has received {received[link]}; no byte has moved for {still:.2f} s."
            for link in open_gaps
        }
        return open_gaps, still, how
    # All that was sent has arrived: a sender that holds what it could pass on has received most beyond what it sent.
    supply = {
        link: sum(count for other, count in received.items() if other[1] == link[0]) - count
        for link, count in sent.items()
    }
    if len(supply) < 2:
        return [], still, {}
    order = sorted(supply, key=lambda link: -supply[link])
    if supply[order[0]] == supply[order[1]]:
        return [], still, {}
    link = order[0]
    how = {
        link: f"Rank {link[0]} has received {supply[link]:+d} messages beyond what it passed on over "
        f"{link[0]}->{link[1]}, more than any other sender; no byte has moved for {still:.2f} s."
    }
    return [link], still, how


def waiting_edges(observation: Observation) -> tuple[tuple[int, int], ...]:
    """(waiter, rank waited for) of all ranks inside an operation and all members that have not entered it; for pictures."""
    progress = observation.progress
    edges: set[tuple[int, int]] = set()
    rows_of: dict[int, list[int]] = {}
    for row in np.flatnonzero(progress.open_type > 0):
        rows_of.setdefault(int(progress.group[row]), []).append(int(row))
    for group, rows in rows_of.items():
        members = np.flatnonzero(progress.group == group)
        for row in rows:
            late = members[progress.entered[members] <= progress.completed[row]]
            edges.update((int(progress.rank[row]), int(rank)) for rank in progress.rank[late])
    return tuple(sorted(edges))


def _some(ranks) -> str:  # type: ignore[no-untyped-def]
    shown = sorted(int(rank) for rank in ranks)
    text = ", ".join(map(str, shown[:6])) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")
    return f"rank{'s' if len(shown) != 1 else ''} {text}"


def _operation(kind: int, element: int, size: int) -> str:
    name = OpType(kind).name.lower() if kind in OpType._value2member_map_ else f"type {kind}"
    dtype = ElementType(element).name.lower() if element in ElementType._value2member_map_ else str(element)
    return f"{name} of {size} bytes" + (f" {dtype}" if element else "")
