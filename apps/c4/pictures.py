"""Pictures of C4: the delay matrix, who waits for whom, how ranks spend their time, and a run's timeline."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from numpy.typing import NDArray

from apps.c4.story import MomentKind, Story
from apps.program.report import PALETTE, new_figure

WORK_COLOR, WAIT_COLOR, CULPRIT_COLOR = PALETTE[0], "#C4CAD0", PALETTE[3]
_MOMENT_COLORS = {
    MomentKind.FAULT: PALETTE[3],
    MomentKind.VERDICT: PALETTE[4],
    MomentKind.ISOLATED: PALETTE[6],
    MomentKind.RESTARTED: PALETTE[1],
    MomentKind.FIRST_STEP: PALETTE[2],
}


def delay_matrix_figure(
    seconds_per_mib: NDArray[np.floating], hot: Sequence[tuple[int, int]] = (), title: str = "Delay matrix"
) -> Figure:
    """Heat map of the connections.

    Args:
        seconds_per_mib: [R, R], source by row and destination by column; nan where there is no connection.
        hot: (source, destination) of cells to frame: the verdict's.
    """
    size = len(seconds_per_mib)
    side = min(9.0, max(3.6, 0.42 * size + 2.2))
    figure, axis = new_figure(side + 1.2, side)
    shown = np.ma.masked_invalid(np.asarray(seconds_per_mib, dtype=float) * 1e3)
    image = axis.imshow(shown, cmap="cividis", interpolation="nearest")
    axis.grid(False)
    axis.set_title(title)
    axis.set_xlabel("destination rank (receives)")
    axis.set_ylabel("source rank (sends)")
    if size <= 16:
        axis.set_xticks(range(size))
        axis.set_yticks(range(size))
        middle = (shown.max() + shown.min()) / 2 if shown.count() else 0.0
        for row, column in zip(*np.nonzero(~np.ma.getmaskarray(shown)), strict=True):
            value = float(shown[row, column])
            axis.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=8,
                      color="black" if value > middle else "white")  # fmt: skip
    for source, destination in hot:
        corner = (destination - 0.5, source - 0.5)
        axis.add_patch(Rectangle(corner, 1.0, 1.0, fill=False, edgecolor=CULPRIT_COLOR, lw=2.5))
    figure.colorbar(image, ax=axis, label="transfer time (ms per MiB)", shrink=0.85)
    return figure


def waiting_chain_figure(
    waits: Sequence[tuple[int, int]], culprits: Sequence[int], ranks: int, title: str = "Who waits for whom"
) -> Figure:
    """Ranks on a circle, an arrow from each rank to the one that it waits for.

    Args:
        waits: (waiting rank, awaited rank).
        culprits: ranks drawn as the faulty ones.
        ranks: number of ranks on the circle.
    """
    figure, axis = new_figure(4.6, 4.6)
    axis.set_aspect("equal")
    axis.set_axis_off()
    axis.set_title(title)
    place = {r: (math.sin(2 * math.pi * r / ranks), math.cos(2 * math.pi * r / ranks)) for r in range(ranks)}
    for waiter, awaited in waits:
        arrow = FancyArrowPatch(
            place[waiter], place[awaited], arrowstyle="-|>", mutation_scale=14, color="#6B7178", lw=1.2,
            shrinkA=15, shrinkB=15, connectionstyle="arc3,rad=0.08",
        )  # fmt: skip
        axis.add_patch(arrow)
    for rank, (x, y) in place.items():
        color = CULPRIT_COLOR if rank in culprits else PALETTE[0]
        axis.scatter([x], [y], s=560, color=color, zorder=3)
        axis.text(x, y, str(rank), ha="center", va="center", color="white", zorder=4, fontsize=10)
    axis.set_xlim(-1.35, 1.35)
    axis.set_ylim(-1.35, 1.35)
    return figure


def pace_figure(
    work_s: NDArray[np.floating],
    wait_s: NDArray[np.floating],
    culprits: Sequence[int] = (),
    title: str = "Own work and waiting",
) -> Figure:
    """Bars of each rank's own time and waiting time per operation; the rank that others wait for itself waits least.

    Args:
        work_s, wait_s: [R], seconds per operation.
    """
    size = len(work_s)
    figure, axis = new_figure(min(12.0, 3.0 + 0.35 * size), 3.4)
    positions = np.arange(size)
    work, wait = 1e3 * np.asarray(work_s, dtype=float), 1e3 * np.asarray(wait_s, dtype=float)
    bars = axis.bar(positions, work, color=WORK_COLOR, label="own work")
    axis.bar(positions, wait, bottom=work, color=WAIT_COLOR, label="waiting in the operation")
    for rank in culprits:
        if 0 <= rank < size:
            bars[rank].set_color(CULPRIT_COLOR)
    axis.set_xlabel("rank")
    axis.set_ylabel("ms per operation")
    axis.set_title(title)
    if size <= 24:
        axis.set_xticks(positions)
    axis.legend(loc="upper right", ncols=2)
    return figure


def timeline_figure(story: Story, title: str = "The run") -> Figure:
    """Loss and step over wall time, with fault, verdict, isolation, restart and first new step as marks."""
    figure, (upper, lower) = new_figure(10.0, 5.6, 2, 1, sharex=True)
    began = story.began_s
    for number, generation in enumerate(sorted({point.generation for point in story.steps})):
        points = [point for point in story.steps if point.generation == generation]
        color = PALETTE[(0, 5)[number % 2]]
        times = [point.at_s - began for point in points]
        upper.plot(times, [point.loss for point in points], color=color, lw=1.2)
        lower.plot(times, [point.step for point in points], color=color, lw=1.6)
    for stop in story.interruptions():
        if stop.first_step_at_s is not None:
            for axis in (upper, lower):
                axis.axvspan(stop.fault_at_s - began, stop.first_step_at_s - began, color="#F2E3DC", zorder=0)
    labelled = set()
    for moment in story.moments:
        color = _MOMENT_COLORS.get(moment.kind)
        if color is None:
            continue
        label = moment.kind.value if moment.kind not in labelled else None
        labelled.add(moment.kind)
        for axis in (upper, lower):
            axis.axvline(moment.at_s - began, color=color, lw=1.1, ls="--", label=label if axis is lower else None)
    upper.set_ylabel("loss")
    upper.set_title(title)
    lower.set_ylabel("optimizer step")
    lower.set_xlabel("wall time (s)")
    if labelled:
        lower.legend(loc="lower right", ncols=len(labelled), fontsize=9)
    return figure
