"""Hangs that a process itself shows: gone, stopped, its heartbeat stale, or its whole node silent. The first thing to judge."""

from __future__ import annotations

import numpy as np

from actors.c4.diagnosis.layout import Layout, Places
from actors.c4.diagnosis.observation import Observation, ProcessState
from actors.c4.diagnosis.settings import DiagnosisSettings
from actors.c4.diagnosis.suspicion import Suspicion
from actors.c4.diagnosis.verdict import FaultKind


def process_suspicions(
    observation: Observation, layout: Layout, places: Places, hang_s: float, still_s: float, settings: DiagnosisSettings
) -> tuple[list[Suspicion], np.ndarray]:
    """Suspicions, and [N] whether a rank's process is in doubt (then its operations say nothing about connections).

    Args:
        hang_s: how long a wait must last to be a hang.
        still_s: since when no rank of the job has moved on.
    """
    rows, now = observation.ranks, observation.at_s
    doubtful = np.zeros(layout.world, dtype=bool)
    found: list[Suspicion] = []
    beat = np.nan_to_num(rows.heartbeat_age_s.astype(np.float64), nan=0.0)
    waited = _longest_wait_for(observation, layout)
    fresh = rows.report_age_s <= settings.stale_report_s

    for row in np.flatnonzero(rows.process_state == ProcessState.GONE):
        rank = int(rows.rank[row])
        doubtful[rank] = True
        said = f"The process of rank {rank} is gone; its heartbeat ran last {beat[row]:.2f} s ago."
        found.append(Suspicion(FaultKind.PROCESS_DEAD, (said,), 0.99, now - float(beat[row]), (rank,)))

    for row in np.flatnonzero((rows.process_state == ProcessState.STOPPED) & fresh):
        rank = int(rows.rank[row])
        doubtful[rank] = True
        said = f"The process of rank {rank} is stopped (state T); its heartbeat ran last {beat[row]:.2f} s ago."
        found.append(
            Suspicion(
                FaultKind.PROCESS_STOPPED,
                (said,),
                0.99,
                now - float(beat[row]),
                (rank,),
                hold_s=settings.stop_confirm_s,
            )
        )

    alive = np.isin(rows.process_state, (ProcessState.RUNNING, ProcessState.SLEEPING, ProcessState.UNKNOWN))
    doubtful[rows.rank[alive & fresh & (beat > 0.5 * hang_s)]] = True
    lost = alive & fresh & (beat > hang_s) & ((waited[rows.rank] > 0.4 * hang_s) | (beat > 2 * hang_s))
    for row in np.flatnonzero(lost):
        rank = int(rows.rank[row])
        words = [
            f"The heartbeat thread of rank {rank} has not run for {beat[row]:.2f} s while its process runs: "
            "something holds the GIL."
        ]
        if waited[rank] > 0:
            words.append(f"Its peers have waited for up to {waited[rank]:.2f} s.")
        found.append(Suspicion(FaultKind.HEARTBEAT_LOST, tuple(words), 0.97, now - float(beat[row]), (rank,)))

    found += _lost_nodes(observation, layout, places, waited, hang_s, still_s, settings, doubtful)
    return found, doubtful


def _lost_nodes(observation, layout, places, waited, hang_s, still_s, settings, doubtful) -> list[Suspicion]:  # type: ignore[no-untyped-def]
    rows = observation.ranks
    age = np.nan_to_num(rows.report_age_s.astype(np.float64), nan=0.0, posinf=np.inf)
    count = len(observation.nodes)
    quiet = np.full(count, np.inf)
    np.minimum.at(quiet, rows.node, age)
    quiet[np.bincount(rows.node, minlength=count) == 0] = 0.0
    longest = np.zeros(count)
    np.maximum.at(longest, rows.node, waited[rows.rank])
    # The cluster itself says inf: no doubt. Else silence counts with its effect only, for agents restart.
    lost = np.isinf(quiet) | ((quiet > settings.node_lost_s) & ((longest > hang_s) | (still_s > hang_s)))
    lost |= (quiet > settings.node_silent_s) & ((longest > 0) | (still_s > settings.node_silent_s))
    silent = quiet > settings.stale_report_s
    doubtful[rows.rank[silent[rows.node]]] = True
    if count > 1 and 2 * np.count_nonzero(silent & np.isfinite(quiet)) > count:
        lost &= np.isinf(quiet)  # most are silent at once: the one who listens is starved or cut off, not they
    found = []
    for node in np.flatnonzero(lost):
        ranks = tuple(sorted(int(rank) for rank in rows.rank[rows.node == node]))
        if np.isinf(quiet[node]):
            said = f"The cluster has lost node {observation.nodes[node]}."
        else:
            said = f"Nothing has come from node {observation.nodes[node]} for {quiet[node]:.2f} s."
        more = f"Peers of its ranks have waited for up to {longest[node]:.2f} s; nobody moved on for {still_s:.2f} s."
        onset = observation.at_s - (quiet[node] if np.isfinite(quiet[node]) else max(still_s, longest[node]))
        found.append(Suspicion(FaultKind.NODE_LOST, (said, more), 0.95, float(onset), ranks))
    return found


def _longest_wait_for(observation: Observation, layout: Layout) -> np.ndarray:
    """[N]: how long another rank of one of its groups has been inside an operation that is still open."""
    progress = observation.progress
    age = np.where(progress.open_type > 0, np.nan_to_num(progress.open_age_s, nan=0.0), 0.0).astype(np.float64)
    groups = len(layout.groups)
    first, second, who = np.zeros(groups), np.zeros(groups), np.full(groups, -1)
    order = np.argsort(age, kind="stable")
    # After sorting the last write wins: the longest wait of a group, whose it is, and the longest of the others.
    first[progress.group[order]] = age[order]
    who[progress.group[order]] = progress.rank[order]
    others = age.copy()
    others[progress.rank == who[progress.group]] = 0.0
    np.maximum.at(second, progress.group, others)
    by_member = np.where(
        who[layout.member_group] == layout.member_rank, second[layout.member_group], first[layout.member_group]
    )
    waited = np.zeros(layout.world)
    np.maximum.at(waited, layout.member_rank, by_member)
    return waited
