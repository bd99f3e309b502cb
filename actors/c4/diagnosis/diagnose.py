"""The diagnosis: an observation of all ranks and what is remembered in, verdicts and the new memory out. Pure, deterministic.

Order of judgement: the process (gone, stopped, heartbeat), then the count of operations, then their kind, then the bytes on the
connections; and apart from hangs, slow work and slow connections. A fault is named once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from actors.c4.diagnosis.connections import connection_suspicions
from actors.c4.diagnosis.history import History
from actors.c4.diagnosis.layout import Layout, places_of
from actors.c4.diagnosis.memory import DiagnosisMemory, Standing, absorb
from actors.c4.diagnosis.observation import BLOCK_OPS, Observation
from actors.c4.diagnosis.processes import process_suspicions
from actors.c4.diagnosis.settings import DiagnosisSettings
from actors.c4.diagnosis.suspicion import Suspicion
from actors.c4.diagnosis.verdict import FaultClass, FaultKind, Verdict
from actors.c4.diagnosis.waits import wait_suspicions
from actors.c4.diagnosis.work import block_seconds, work_suspicions


def diagnose(
    observation: Observation, memory: DiagnosisMemory, settings: DiagnosisSettings = DiagnosisSettings()
) -> tuple[tuple[Verdict, ...], DiagnosisMemory]:
    """Looks once. Call it again with the memory that it returned, several times a second.

    Args:
        observation: of all ranks; its blocks may be the new ones alone, or some that came before (rows are recognised).
        memory: ``DiagnosisMemory()`` at first.

    Returns: the faults named at this look, hangs first; and the memory for the next look.
    """
    memory, news, link_news = absorb(memory, observation, settings)
    layout = memory.layout
    if layout is None:  # absorb has made one
        return (), memory
    now = observation.at_s
    places = places_of(observation.ranks, observation.nodes, layout.world)
    still = now - memory.moved_s
    ready, doubtful = process_suspicions(observation, layout, places, memory.hang_s, still, settings)
    ready += wait_suspicions(observation, layout, places, doubtful, memory.hang_s, settings)
    waiting: list[Suspicion] = []
    deferred = any(not one.named for one in memory.standing.values())
    if memory.blocks is not None and len(memory.blocks.keys) and (news or link_news or deferred):
        place = _places_in_layout(memory, memory.blocks, layout)
        block_s = block_seconds(memory.blocks)
        now_ready, later = work_suspicions(memory.blocks, layout, place, block_s, places, memory.step_s, now, settings)
        ready, waiting = ready + now_ready, waiting + later
        if memory.links is not None and len(memory.links.keys):
            intervals = _intervals(block_s, place, len(layout.groups))
            now_ready, later = connection_suspicions(
                memory.links,
                layout,
                _places_in_layout(memory, memory.links, layout),
                places,
                intervals,
                memory.step_s,
                now,
                settings,
            )
            ready, waiting = ready + now_ready, waiting + later
    ready, waiting = ([_patient(one, observation, memory, settings) for one in some] for some in (ready, waiting))
    named, memory = _name(ready, waiting, memory, now, settings)
    return tuple(one.verdict(now, memory.standing[one.key].onset_s, places) for one in named), memory


_BUSY_HOSTS_DOING = frozenset({
    FaultKind.HEARTBEAT_LOST, FaultKind.NEVER_ENTERED, FaultKind.WORK_SLOW,
    FaultKind.LINK_SLOW, FaultKind.SENDER_SLOW, FaultKind.RECEIVER_SLOW,
})  # fmt: skip
"""What a process looks like that waits for a processor."""


def _patient(
    one: Suspicion, observation: Observation, memory: DiagnosisMemory, settings: DiagnosisSettings
) -> Suspicion:
    """The suspicion, to be held for longer when the culprit's processes wait for processors."""
    if one.kind not in _BUSY_HOSTS_DOING:
        return one
    rows = observation.ranks
    delays = rows.wake_delay_s[np.isin(rows.rank, one.link or one.ranks)]
    longest = float(np.nan_to_num(delays, nan=0.0).max(initial=0.0))
    if longest <= settings.busy_wake_s:
        return one
    said = f"The host is busy: its processes wait {longest * 1e3:.0f} ms for a processor whenever they have to run."
    slow = one.kind.fault_class in (FaultClass.COMMUNICATION_SLOW, FaultClass.NON_COMMUNICATION_SLOW)
    hold_s = settings.busy_hold_s if slow else settings.busy_hang_hold_s
    if slow and memory.blocks is not None:
        # The history must still remember the healthy past, or what lasts becomes the usual.
        block_s = np.nan_to_num(block_seconds(memory.blocks), nan=np.inf)
        hold_s = min(hold_s, settings.history_blocks / 4 * float(np.median(block_s)))
    return replace(one, evidence=(*one.evidence, said), hold_s=max(one.hold_s, hold_s), busy=slow)


def _name(
    ready: Sequence[Suspicion],
    waiting: Sequence[Suspicion],
    memory: DiagnosisMemory,
    now: float,
    settings: DiagnosisSettings,
) -> tuple[list[Suspicion], DiagnosisMemory]:
    """Which suspicions are named now: those that have lasted, and whose parts nobody has been told of."""
    standing = {key: one for key, one in memory.standing.items() if now - one.last_s <= settings.forget_s}
    parts = {part: last for part, last in memory.parts.items() if now - last <= settings.forget_s}
    patience = max(settings.defer_s, 4 * memory.step_s if np.isfinite(memory.step_s) else 0.0)
    earlier_death = any(
        one.named and one.since_s < now - 1.0 and isinstance(key, tuple) and key[0] is FaultKind.PROCESS_DEAD
        for key, one in standing.items()
    )  # type: ignore[index]
    named: list[Suspicion] = []
    unbroken = max(1.0, 2 * memory.step_s if np.isfinite(memory.step_s) else 0.0)
    for one, hold in [(one, one.hold_s) for one in ready] + [(one, max(patience, one.hold_s)) for one in waiting]:
        old = standing.get(one.key)
        if old is not None and one.busy and not old.named and now - old.last_s > unbroken:
            old = None
        # A look that missed it in between does not matter, a long pause does: it is another occurrence then.
        since, onset = (old.since_s, old.onset_s) if old else (now, one.onset_s)
        known = old is not None and old.named
        blamed = any(part in parts for part in one.parts)
        collateral = one.kind is FaultKind.PROCESS_DEAD and earlier_death
        due = now - since >= hold - 1e-9
        if due and not known and not blamed and not collateral:
            named.append(one)
            known = True
        if known or blamed:
            parts.update((part, now) for part in one.settles if known or part in parts)
        standing[one.key] = Standing(since, onset, now, known or blamed)
    return named, replace(memory, standing=standing, parts=parts)


def _places_in_layout(memory: DiagnosisMemory, history: History, layout: Layout) -> np.ndarray:
    """[series]: index in the layout of each series' group; -1 for a group that the job has no more."""
    place = np.full(len(memory.group_ids), -1, dtype=np.int64)
    for index, group in enumerate(layout.groups):
        place[memory.group_ids[group.name]] = index
    return place[history.group]


def _intervals(block_s: np.ndarray, place: np.ndarray, groups: int) -> np.ndarray:
    """[G]: seconds from one operation of a group to the next."""
    result = np.full(groups, np.nan)
    known = np.flatnonzero(place >= 0)
    # Ranks of a group agree up to noise: whichever comes last will do.
    result[place[known]] = block_s[known] / BLOCK_OPS
    return result
