"""Whether a series of blocks has lately become slow: against its like in the same blocks, and against its own past.

A step has phases (forward, backward, embedding), and all ranks have a long step at times: so a block is divided by what is usual
among its like in the very same block. What remains is near 1 in health, whatever the phase; its own past tells how near.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.c4.diagnosis.history import MAD_TO_DEVIATION, basis_of_like, masked_median, median_of_others
from actors.c4.diagnosis.settings import DiagnosisSettings

SIEVE_FROM = 4096
"""From so many series on only those that lie above their past at all are judged."""


@dataclass(frozen=True)
class Trend:
    """Of N series: what they are now, and what they would be in health. [N] each."""

    present: NDArray[np.float64]
    """Over the recent blocks; nan when there are too few."""
    normal: NDArray[np.float64]
    """What the present would be in health: its like's present, times its own usual distance from them."""
    like: NDArray[np.float64]
    """What is usual among its like now; nan without others."""
    slow: NDArray[np.bool_]
    lasting: NDArray[np.bool_]
    """Slow for so long that even a trifle is no chance."""
    near: NDArray[np.bool_]
    """Not slow, but the newest blocks look like it: it may become slow in a moment."""
    streak: NDArray[np.int64]
    """Newest blocks in a row that are elevated."""
    decide_s: NDArray[np.float64]
    """How long a slowness must last until this series shows it."""
    recent: NDArray[np.int64]
    """Number of blocks that count as the present."""

    @property
    def ratio(self) -> NDArray[np.float64]:
        """Present over normal."""
        return self.present / np.maximum(self.normal, 1e-15)


def recent_count(
    block_s: NDArray[np.float64], step_s: float, width: int, settings: DiagnosisSettings
) -> NDArray[np.int64]:
    """[N]: blocks that make the present: three (two when a block alone holds two steps), two steps' worth, and a second's."""
    if not np.isfinite(step_s):
        return np.full(len(block_s), settings.recent_blocks)
    known = np.where(np.isfinite(block_s) & (block_s > 0), block_s, step_s)
    blocks = np.ceil(settings.recent_steps * step_s / known * 0.95).astype(np.int64)
    floor = np.where(known >= 1.8 * step_s, min(2, settings.recent_blocks), settings.recent_blocks)
    blocks = np.maximum(blocks, np.ceil(settings.recent_s / known - 1e-6).astype(np.int64))
    return np.clip(blocks, floor, width // 3)


def trend_of(
    values: NDArray[np.float32],
    block: NDArray[np.int32],
    block_s: NDArray[np.float64],
    label: NDArray[np.int64],
    kind: NDArray[np.int64],
    floor: NDArray[np.float64],
    step_s: float,
    settings: DiagnosisSettings,
    trifles: bool = False,
) -> Trend:
    """Judges N series.

    Args:
        values: [N, W], the newest first, columns aligned within a label; nan where missing.
        block: [N, W], block numbers; -1 where missing.
        block_s: [N], seconds from one block to the next.
        label: [N]: series of one label are like each other.
        kind: [N]: who has no like is compared, in its rise, with those of its kind.
        floor: [N]: an excess below this slows nobody.
        step_s: duration of a step; nan when unknown.
        trifles: whether to tell which slowness is ``lasting``.
    """
    count, width = values.shape
    basis, members = basis_of_like(values, label)
    relative = values / np.maximum(basis, np.float32(1e-15))
    valid = np.isfinite(relative)
    recent = recent_count(block_s, step_s, width, settings)
    decide_s = (recent + 1) * np.where(np.isfinite(block_s), block_s, 0.0)
    head = int(recent.max(initial=1))  # columns beyond it are nobody's present
    is_recent = valid[:, :head] & (np.arange(head) < recent[:, None])
    told = is_recent.sum(axis=1)
    # The newest column may still be on its way from some: one block less does, too.
    enough = told >= np.maximum(2, np.maximum(settings.recent_share * recent, recent - 1))
    present = np.where(enough, masked_median(relative[:, :head], is_recent), np.nan).astype(np.float64)
    level = masked_median(basis[:, :head], is_recent).astype(np.float64)
    agreement, others = median_of_others(np.abs(present - 1.0), label)  # of all, the sieved ones included

    usual = np.ones(count)
    slow, lasting, near = (np.zeros(count, dtype=bool) for _ in range(3))
    streak = np.zeros(count, dtype=np.int64)
    rows = np.arange(count) if count <= SIEVE_FROM else _candidates(relative, valid, present, recent)
    # Soon what stands far out of the noise; with twice the blocks what stands out of it less.
    for times, deviations in ((1, settings.deviations), (2, settings.deviations * 0.6), (4, settings.deviations * 0.6)):
        if not len(rows) or (times == 4 and not trifles):
            break
        blocks = np.minimum(times * recent[rows], width // 2)
        judged = _judge(
            relative[rows], valid[rows], block[rows], blocks, level[rows], label[rows], members[rows] == 1, kind[rows],
            floor[rows], agreement[rows], others[rows], deviations, settings,
        )  # fmt: skip
        better = judged.slow & ~slow[rows]
        chosen = better if times > 1 else np.ones(len(rows), dtype=bool)
        where = rows[chosen]
        present[where], usual[where], streak[where] = (
            judged.present[chosen],
            judged.usual[chosen],
            judged.streak[chosen],
        )
        slow[where] = judged.slow[chosen]
        if times == 4:
            lasting[rows] = judged.slow
        near[rows] = (near[rows] | judged.near) & ~slow[rows]
    return Trend(
        present * level,
        usual * level,
        np.where(members > 1, level, np.nan),
        slow,
        lasting,
        near,
        streak,
        decide_s,
        recent,
    )


def _candidates(relative, valid, present, recent) -> NDArray[np.int64]:  # type: ignore[no-untyped-def]
    """[K]: series whose present, or newest blocks, lie above their past at all: a sieve that spares the others the sorting."""
    # Clipped: a pause of many steps in one block must not lift the mean.
    clipped = np.where(valid, np.minimum(relative, np.float32(2.0)), np.float32(0.0))
    width = relative.shape[1]
    sums = np.cumsum(clipped, axis=1, dtype=np.float32)
    counts = np.cumsum(valid, axis=1, dtype=np.int32)
    at = np.arange(len(relative))
    newest = np.maximum(2, recent // 2) - 1
    edge = np.minimum(recent, width - 1)
    past = (sums[:, -1] - sums[at, edge]) / np.maximum(counts[:, -1] - counts[at, edge], 1)
    past = np.where(counts[:, -1] > counts[at, edge], past, 1.0)
    now = sums[at, newest] / np.maximum(counts[at, newest], 1)
    return np.flatnonzero((present > 1.08 * past) | (now > 1.12 * past))


@dataclass(frozen=True)
class _Judged:
    """Of K candidates; present and usual (the present as it would be in health) relative to the like. [K] each."""

    present: NDArray[np.float64]
    usual: NDArray[np.float64]
    slow: NDArray[np.bool_]
    near: NDArray[np.bool_]
    streak: NDArray[np.int64]


def _judge(
    relative, valid, block, recent, level, label, alone, kind, floor, agreement, others, deviations, settings
) -> _Judged:  # type: ignore[no-untyped-def]
    age = np.arange(relative.shape[1])
    is_recent = valid & (age < recent[:, None])
    told = is_recent.sum(axis=1)
    enough = told >= np.maximum(2, np.maximum(settings.recent_share * recent, recent - 1))
    present = np.where(enough, masked_median(relative, is_recent), np.nan).astype(np.float64)
    # One block between present and past may be half healthy: it belongs to neither.
    is_past = valid & (age > recent[:, None]) & (block >= settings.warmup_blocks)
    calibrated = is_past.sum(axis=1) >= settings.past_blocks
    past = np.where(calibrated, masked_median(relative, is_past), np.nan).astype(np.float64)
    off = np.abs(relative - past[:, None].astype(np.float32))
    spread = MAD_TO_DEVIATION * masked_median(off, is_past & calibrated[:, None]).astype(np.float64)
    # Few blocks may by chance lie close together: what its like scatter tells more.
    spread = np.fmax(spread, median_of_others(spread, label)[0])

    # Who is alone is relative to itself: what its kind went through at the same time is no fault of its own.
    rise, _ = median_of_others(np.where(alone, present / past, np.nan), kind)
    usual = np.where(alone, past * np.fmax(1.0, rise), past)
    # Slow from the beginning: far above at least three others, which agree among themselves.
    newcomer = ~calibrated & (others >= 3) & (valid.sum(axis=1) >= settings.uncalibrated_blocks)
    usual = np.where(newcomer, 1.0, usual)
    least = np.where(newcomer, settings.uncalibrated_ratio, settings.own_ratio)
    noise = deviations * np.where(newcomer, MAD_TO_DEVIATION * agreement, spread)
    noise = np.fmax(noise, np.where(others >= 3, settings.disagreement * MAD_TO_DEVIATION * agreement, 0.0))
    limit = np.fmax(usual * least, usual + np.fmax(noise, floor / np.maximum(level, 1e-15)))

    with np.errstate(invalid="ignore"):
        # Its median beyond the limit, and nearly every block of its own at least half way.
        elevated = valid & (relative > (0.5 * (usual + limit))[:, None])
        share = (elevated & is_recent).sum(axis=1) >= np.maximum(2, settings.recent_share * told)
        slow = enough & share & (present > limit)
        looked = valid & (age < np.maximum(2, recent[:, None] // 2))
        beyond = (looked & (relative > limit[:, None])).sum(axis=1)
    near = ~slow & (beyond >= np.maximum(2, settings.recent_share * looked.sum(axis=1)))
    # Leading columns that have not come yet do not end a streak.
    streak = np.logical_and.accumulate(elevated | (~valid & (age < 2)), axis=1).sum(axis=1)
    streak = np.maximum(streak, np.where(slow, (recent * settings.recent_share).astype(np.int64), 0))
    return _Judged(present, usual, slow, near, streak)
