"""Non-communication slow: the rank that others wait for because its own work between operations takes longer.

Collectives are receiver-driven: who comes early waits, so the culprit waits least and its mates wait for it. Its own work
(a duration on its own clock) tells by how much. Ranks are compared with their data-parallel peers, which do the same work
on the same stage, or with the members of the group where there is no such group.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from actors.c4.diagnosis.history import History, masked_median, median_of_others
from actors.c4.diagnosis.layout import EXPERT, PIPELINE, Layout, Places
from actors.c4.diagnosis.observation import BLOCK_OPS
from actors.c4.diagnosis.settings import DiagnosisSettings
from actors.c4.diagnosis.suspicion import Suspicion
from actors.c4.diagnosis.trend import trend_of
from actors.c4.diagnosis.verdict import FaultKind


def block_seconds(history: History) -> NDArray[np.float64]:
    """[N]: seconds from one block of each series of (work, wait) to the next.

    What a rank spent in all its groups together is its time; a group's blocks are spread over it.
    """
    there = history.block >= 0
    both = np.where(there, history.values[0] + history.values[1], np.float32(0))
    spent = BLOCK_OPS * both.sum(axis=1, dtype=np.float64) / np.maximum(there.sum(axis=1), 1)
    count = history.newest + 1.0
    rank = history.first
    total = np.bincount(rank, weights=spent * count, minlength=int(rank.max(initial=0)) + 1)
    return total[rank] / np.maximum(count, 1.0)


def work_suspicions(
    history: History,
    layout: Layout,
    place: NDArray[np.int64],
    block_s: NDArray[np.float64],
    places: Places,
    step_s: float,
    now_s: float,
    settings: DiagnosisSettings,
) -> tuple[list[Suspicion], list[Suspicion]]:
    """Suspicions, and those to wait for a little: neighbours on the same node are about to join them.

    Args:
        history: series (group, rank) of (work, wait), mean seconds per operation.
        place: [series]: index of the series' group in ``layout``; -1 when the job has it no more.
        block_s: [series], see ``block_seconds``.
    """
    keep = np.flatnonzero(place >= 0)
    if not len(keep):
        return [], []
    kept, group = history.chosen(keep), place[keep]
    rank = kept.first
    label = like_labels(layout, group, rank)
    work, block = kept.by_age(0, label)
    expert, pipeline = layout.has_role(EXPERT)[group], layout.has_role(PIPELINE)[group]
    interval = block_s[keep] / BLOCK_OPS
    trend = trend_of(
        work, block, block_s[keep], label, layout.role[group], settings.work_share_floor * interval, step_s, settings
    )
    # How an expert layer is loaded depends on the data: it shows waiting, but convicts nobody.
    slow = trend.slow & ~expert
    if not slow.any():
        return [], []

    recent = (block >= 0) & (np.arange(block.shape[1]) < trend.recent[:, None])
    own_wait = masked_median(kept.by_age(1, label)[0], recent)
    mates_wait, mates = median_of_others(np.where(pipeline, np.nan, own_wait), group)
    held_s = np.where(mates > 0, mates_wait - own_wait, np.nan)
    excess = trend.present - trend.normal

    most_held, asked = np.full(layout.world, -np.inf), np.zeros(layout.world, dtype=bool)
    rows = np.flatnonzero(np.isfinite(held_s))
    np.maximum.at(most_held, rank[rows], held_s[rows])
    asked[rank[rows]] = True
    best: dict[int, int] = {}
    for row in np.flatnonzero(slow & np.isfinite(excess)):
        one = int(rank[row])
        if asked[one] and most_held[one] < settings.waiting_share * excess[row]:
            continue  # it is slower, and nobody minds
        if one not in best or excess[row] / interval[row] > excess[best[one]] / interval[best[one]]:
            best[one] = int(row)
    # Who is slow, but whose mates have had no time to show that they wait, is about to join, too.
    near = set(rank[(trend.near | slow) & ~expert].tolist())
    if len(best) > 1:
        # Beside slow ranks of a node it takes less of a proof: raised by more than half as much is on the way to it.
        usual = float(np.median(trend.ratio[list(best.values())]))
        near |= set(rank[(trend.ratio > 1 + 0.6 * (usual - 1)) & ~expert].tolist())
    return _by_node(best, near, trend, history, layout, places, group, most_held, interval, now_s)


def like_labels(layout: Layout, group: NDArray[np.int64], rank: NDArray[np.int64]) -> NDArray[np.int64]:
    """[N]: series of one label belong to ranks that do the same work at the same place of the program.

    With data-parallel groups: same role, same data-parallel group, and for pairs (pipeline) the same two stages. Without: the
    same group; a pipeline's stages are then like nobody.
    """
    # Data-parallel groups get small numbers, so that a label is one integer.
    groups, stage = np.unique(layout.data_group, return_inverse=True)
    stage, count = stage.reshape(-1), len(groups) + 1
    data = layout.data_group[rank]
    pair = layout.has_role(PIPELINE)[group]
    ends = np.full((2, len(group)), count - 1)
    firsts = np.array([one.ranks[0] if one.ranks else 0 for one in layout.groups], dtype=np.int64)
    lasts = np.array([one.ranks[-1] if one.ranks else 0 for one in layout.groups], dtype=np.int64)
    ends[0, pair], ends[1, pair] = stage[firsts[group[pair]]], stage[lasts[group[pair]]]
    by_stage = ((layout.role[group] * count + stage[rank]) * count + ends[0]) * count + ends[1]
    # Where the data-parallel group is too small for a comparison, the members of the group are the like.
    lonely = (data < 0) | (layout.size[np.maximum(data, 0)] < 3)
    label = np.where(lonely & ~pair, -1 - group, by_stage)
    alone = lonely & pair & (data < 0)
    label[alone] = by_stage.max(initial=0) + 1 + np.arange(int(alone.sum()))
    return np.unique(label, return_inverse=True)[1].reshape(-1)


def _by_node(best, near, trend, history, layout, places, group, held, interval, now_s):  # type: ignore[no-untyped-def]
    """One suspicion a rank; one for a node of several ranks when all of them are slow."""
    ready: list[Suspicion] = []
    waiting: list[Suspicion] = []
    nodes: dict[int, list[int]] = {}
    for one in sorted(best):
        nodes.setdefault(int(places.node[one]), []).append(one)
    residents = np.bincount(places.node[places.node >= 0], minlength=len(places.names))
    for node, ranks in nodes.items():
        total = int(residents[node]) if node >= 0 else 0
        if total > 1 and len(ranks) == total:
            ready.append(
                _suspicion(tuple(ranks), best, trend, layout, group, held, interval, now_s, places.names[node])
            )
            continue
        joining = node >= 0 and any(
            other in near for other in np.flatnonzero(places.node == node).tolist() if other not in best
        )
        for one in ranks:
            suspicion = _suspicion((one,), best, trend, layout, group, held, interval, now_s)
            (waiting if joining or len(ranks) > 1 else ready).append(suspicion)
    return ready, waiting


def _suspicion(ranks, best, trend, layout, group, held, interval, now_s, node=""):  # type: ignore[no-untyped-def]
    rows = [best[one] for one in ranks]
    row = max(rows, key=lambda index: trend.ratio[index])
    ratio = float(np.median(trend.ratio[rows]))
    where = layout.groups[group[row]]
    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"all {len(ranks)} ranks of node {node}"
    said = [
        f"Between operations of group {where.name!r} {who} works {trend.present[row] * 1e3:.2f} ms "
        f"where {trend.normal[row] * 1e3:.2f} ms is normal ({ratio:.2f} x), "
        f"over {int(trend.streak[row])} blocks of {BLOCK_OPS} operations."
    ]
    if np.isfinite(trend.like[row]):
        said.append(f"The others that do the same work take {trend.like[row] * 1e3:.2f} ms.")
    most = max(float(held[one]) for one in ranks)
    if np.isfinite(most) and most > 0:
        said.append(f"Its mates wait {most * 1e3:.2f} ms longer per operation than it does: they wait for it.")
    onset = now_s - float(np.max(trend.streak[rows] * BLOCK_OPS * interval[rows]))
    confidence = float(np.clip(0.7 + 0.3 * (ratio - 1.0), 0.7, 0.98))
    return Suspicion(
        FaultKind.WORK_SLOW, tuple(said), confidence, onset, ranks, group=where.name, slowdown=max(1.0, ratio)
    )
