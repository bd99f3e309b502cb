"""What a C4Trainer says about a run beside Ray Train's result: verdicts, restarts, phases with times. No Ray."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Phase(StrEnum):
    """Moments of a generation's life, in the order of a restart."""

    FAILURE_SEEN = "failure_seen"
    FENCED = "fenced"
    """The old generation's processes are gone."""
    GROUP_DOWN = "group_down"
    """Ray Train has let go of the old worker group."""
    NODES_CHOSEN = "nodes_chosen"
    WORKERS_PLACED = "workers_placed"
    """All worker processes answer."""
    CHECKPOINT_READY = "checkpoint_ready"
    """The newest whole checkpoint is on every node."""
    GROUP_READY = "group_ready"
    """The process group exists."""
    TRAINING = "training"
    """The loop has been started on all workers."""
    FIRST_REPORT = "first_report"
    ENDED = "ended"


@dataclass(frozen=True)
class Event:
    """A moment of the run; ``at_s`` is seconds since the epoch on the controller's clock."""

    at_s: float
    generation: int
    phase: Phase
    detail: str = ""


@dataclass(frozen=True)
class Restart:
    """One restart. Times are seconds since the failure was seen; nan when the phase was not reached."""

    generation: int
    """The new one's number."""
    cause: str
    detail: str
    seen_at_s: float
    excluded: tuple[str, ...]
    """Nodes that the new generation was kept off."""
    resumed_from: str
    """Version of the checkpoint in memory, "disk", or "" (from the beginning)."""
    phases_s: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class C4Outcome:
    """``result.c4``."""

    run: str
    generations: int
    restarts: tuple[Restart, ...]
    verdicts: tuple[Any, ...]
    """The master's ``NumberedVerdict``s of the run, oldest first."""
    released: tuple[tuple[str, str], ...]
    """(node id, why it was taken out of quarantine)."""
    events: tuple[Event, ...]


def restarts_of(events: list[Event], notes: dict[int, dict[str, Any]]) -> tuple[Restart, ...]:
    """The restarts in a run's events; ``notes``: cause, detail, excluded, resumed_from by generation."""
    restarts = []
    seen: Event | None = None
    phases: list[tuple[str, float]] = []
    for event in events:
        if event.phase is Phase.FAILURE_SEEN:
            seen, phases = event, []
        elif seen is not None:
            phases.append((str(event.phase), event.at_s - seen.at_s))
            if event.phase in (Phase.FIRST_REPORT, Phase.ENDED):
                restarts.append(_restart(seen, event.generation, phases, notes))
                seen = None
    if seen is not None and len(phases) > 1:
        restarts.append(_restart(seen, events[-1].generation, phases, notes))
    return tuple(restarts)


def _restart(
    seen: Event, generation: int, phases: list[tuple[str, float]], notes: dict[int, dict[str, Any]]
) -> Restart:
    note = notes.get(generation, {})
    cause, _, detail = seen.detail.partition(": ")
    return Restart(
        generation,
        cause,
        detail,
        seen.at_s,
        tuple(note.get("excluded", ())),
        note.get("resumed_from", ""),
        tuple(phases),
    )
