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
    """[N]: blocks that make the present: at least three, and two steps' worth; two when a block alone holds two steps."""
    if not np.isfinite(step_s):
        return np.full(len(block_s), settings.recent_blocks)
    known = np.where(np.isfinite(block_s) & (block_s > 0), block_s, step_s)
    blocks = np.ceil(settings.recent_steps * step_s / known * 0.95).astype(np.int64)
    floor = np.where(known >= 1.8 * step_s, min(2, settings.recent_blocks), settings.recent_blocks)
    return np.clip(blocks, floor, width // 3)


def trend_of(
    values: NDArray[np.float32],
    block: NDArray[np.int64],
    block_s: NDArray[np.float64],
    label: NDArray[np.int64],
    kind: NDArray[np.int64],
    floor: NDArray[np.float64],
    step_s: float,
    settings: DiagnosisSettings,
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
    """
    width = values.shape[1]
    basis, members = basis_of_like(values, label)
    relative = values / np.maximum(basis, 1e-15)
    valid = (block >= 0) & np.isfinite(relative)
    recent = recent_count(block_s, step_s, width, settings)
    age = np.arange(width)
    # One block between the two may be half healthy: it belongs to neither.
    is_recent = valid & (age < recent[:, None])
    is_past = valid & (age > recent[:, None]) & (block >= settings.warmup_blocks)
    # The newest column may still be on its way from some: one block less does, too.
    enough = is_recent.sum(axis=1) >= np.maximum(2, np.maximum(settings.recent_share * recent, recent - 1))
    level = masked_median(basis, is_recent).astype(np.float64)
    present = np.where(enough, masked_median(relative, is_recent), np.nan).astype(np.float64)
    calibrated = is_past.sum(axis=1) >= settings.past_blocks
    past = np.where(calibrated, masked_median(relative, is_past), np.nan).astype(np.float64)
    off = np.abs(relative - past[:, None].astype(np.float32))
    spread = MAD_TO_DEVIATION * masked_median(off, is_past & calibrated[:, None])

    # Who is alone is relative to itself: what its kind went through at the same time is no fault of its own.
    alone = members == 1
    rise, _ = median_of_others(np.where(alone, present / past, np.nan), kind)
    usual = np.where(alone, past * np.fmax(1.0, rise), past)
    # Slow from the beginning: far above at least three others, which agree among themselves.
    agreement, others = median_of_others(np.abs(present - 1.0), label)
    newcomer = ~calibrated & (others >= 3) & (valid.sum(axis=1) >= settings.uncalibrated_blocks)
    usual = np.where(newcomer, 1.0, usual)
    least = np.where(newcomer, settings.uncalibrated_ratio, settings.own_ratio)
    noise = settings.deviations * np.where(newcomer, MAD_TO_DEVIATION * agreement, spread)
    noise = np.fmax(noise, np.where(others >= 3, settings.disagreement * MAD_TO_DEVIATION * agreement, 0.0))
    limit = np.fmax(usual * least, usual + np.fmax(noise, floor / np.maximum(level, 1e-15)))

    with np.errstate(invalid="ignore"):
        # Its median beyond the limit, and nearly every block of its own at least half way.
        elevated = valid & (relative > (0.5 * (usual + limit))[:, None])
        share = (elevated & is_recent).sum(axis=1) >= np.maximum(2, settings.recent_share * is_recent.sum(axis=1))
        slow = enough & share & (present > limit)
        looked = valid & (age < np.maximum(2, recent[:, None] // 2))
        beyond = (looked & (relative > limit[:, None])).sum(axis=1)
    near = ~slow & (beyond >= np.maximum(2, settings.recent_share * looked.sum(axis=1)))
    # Leading columns that have not come yet do not end a streak.
    streak = np.logical_and.accumulate(elevated | (~valid & (age < 2)), axis=1).sum(axis=1)
    streak = np.maximum(streak, np.where(slow, (recent * settings.recent_share).astype(np.int64), 0))
    decide_s = (recent + 1) * np.where(np.isfinite(block_s), block_s, 0.0)
    return Trend(
        present * level, usual * level, np.where(members > 1, level, np.nan), slow, near, streak, decide_s, recent
    )
