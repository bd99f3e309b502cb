"""What diagnosis remembers from one look to the next: the healthy past, the job's step, the faults it has named. Immutable."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from actors.c4.diagnosis.history import History, no_history, series_key
from actors.c4.diagnosis.layout import Layout, layout_of
from actors.c4.diagnosis.observation import Observation
from actors.c4.diagnosis.settings import DiagnosisSettings
from actors.c4.diagnosis.work import block_seconds


@dataclass(frozen=True)
class Standing:
    """A fault that is being seen."""

    since_s: float
    """First look that showed it."""
    onset_s: float
    """The onset that the first look told."""
    last_s: float
    named: bool


@dataclass(frozen=True)
class DiagnosisMemory:
    """Start with ``DiagnosisMemory()`` and pass on what ``diagnose`` returns. Another generation starts it anew by itself."""

    generation: int | None = None
    group_ids: Mapping[str, int] = field(default_factory=dict)
    """Number of a group in the histories, by name."""
    blocks: History | None = None
    """Series (group, rank) of (work, wait) per operation."""
    links: History | None = None
    """Series (group, source, destination) of (seconds per byte, bytes per operation)."""
    layout: Layout | None = None
    step_s: float = float("nan")
    """Typical duration of a step of the job; nan while unknown."""
    hang_s: float = float("nan")
    """How long a wait must last to be a hang, as of the last look."""
    longest_wait_s: float = 0.0
    """The longest open wait at the last look."""
    survived_s: float = 0.0
    """The longest wait that ended well, fading."""
    counters: int = -1
    """Sum of all operations entered and completed at the last look."""
    moved_s: float = float("nan")
    """When that sum last changed."""
    at_s: float = float("nan")
    standing: Mapping[Hashable, Standing] = field(default_factory=dict)
    """Faults by their key."""
    parts: Mapping[Hashable, float] = field(default_factory=dict)
    """Parts that have been blamed already, and when they were last suspected."""


def absorb(
    memory: DiagnosisMemory, observation: Observation, settings: DiagnosisSettings
) -> tuple[DiagnosisMemory, bool, bool]:
    """The memory with this observation's rows in it, and whether blocks and whether link blocks are news."""
    if memory.generation != observation.generation:
        memory = DiagnosisMemory(generation=observation.generation)
    layout = memory.layout
    if (
        layout is None
        or layout.groups != observation.groups
        or layout.world <= int(observation.ranks.rank.max(initial=-1))
    ):
        layout = layout_of(observation.groups, observation.ranks)
    ids = memory.group_ids
    fresh = [group.name for group in observation.groups if group.name not in ids]
    if fresh:
        ids = {**ids, **{name: len(ids) + index for index, name in enumerate(fresh)}}
    number = np.array([ids[group.name] for group in observation.groups], dtype=np.int64)

    rows, links = observation.blocks, observation.link_blocks
    blocks = memory.blocks or no_history(2, settings.history_blocks)
    past = memory.links or no_history(2, settings.history_blocks)
    news = link_news = False
    if len(rows.rank):
        values = np.stack([np.maximum(rows.work_s, 0), np.maximum(rows.wait_s, 0)]).astype(np.float32)
        blocks, news = blocks.with_rows(series_key(number[rows.group], rows.rank), rows.block, values)
    moved = links.bytes > 0
    if moved.any():
        size = links.bytes[moved].astype(np.float64)
        values = np.stack([links.transfer_s[moved] / size, size / 4]).astype(np.float32)
        keys = series_key(number[links.group[moved]], links.source[moved], links.destination[moved])
        past, link_news = past.with_rows(keys, links.block[moved], values)
    memory = replace(memory, group_ids=ids, blocks=blocks, links=past, layout=layout)
    memory = replace(memory, step_s=_step(memory, observation, news))
    return _with_motion(memory, observation, settings), news, link_news


def _step(memory: DiagnosisMemory, observation: Observation, news: bool) -> float:
    told = observation.ranks.step_s[np.isfinite(observation.ranks.step_s) & (observation.ranks.step_s > 0)]
    if len(told):
        return float(np.median(told))
    if not news or memory.blocks is None:
        return memory.step_s
    # Nobody counted steps. Where a step has several blocks, the longest of them is nearest to it; where a block has several
    # steps, this errs on the patient side.
    full = memory.blocks.newest >= 4
    seconds = block_seconds(memory.blocks)[full]
    seconds = seconds[np.isfinite(seconds)]
    return float(np.percentile(seconds, 90)) if len(seconds) else memory.step_s


def _with_motion(memory: DiagnosisMemory, observation: Observation, settings: DiagnosisSettings) -> DiagnosisMemory:
    progress, now = observation.progress, observation.at_s
    counters = int(progress.entered.sum() + progress.completed.sum())
    moved = now if counters != memory.counters or not np.isfinite(memory.moved_s) else memory.moved_s
    open_age = np.where(progress.open_type > 0, np.nan_to_num(progress.open_age_s, nan=0.0), 0.0)
    longest = float(open_age.max(initial=0.0))
    survived = memory.survived_s
    if np.isfinite(memory.at_s) and now > memory.at_s:
        survived *= 0.5 ** ((now - memory.at_s) / settings.survived_half_life_s)
    if longest < 0.5 * memory.longest_wait_s and np.isfinite(memory.step_s):
        survived = max(survived, memory.longest_wait_s)
    hang = settings.hang_unknown_s
    if np.isfinite(memory.step_s):
        base = max(settings.hang_floor_s, settings.hang_steps * memory.step_s)
        hang = max(base, min(settings.survived_factor * survived, settings.survived_cap * base))
    return replace(
        memory, counters=counters, moved_s=moved, longest_wait_s=longest, survived_s=survived, hang_s=hang, at_s=now
    )
