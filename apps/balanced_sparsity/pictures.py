"""Pictures of a training and of a sweep: the course, score against sparsity, sensitivity to the block size, weight maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.program.report import PALETTE, new_figure

MAP_SIDE = 64
"""Rows and columns of the corner of a weight matrix that a map shows."""


@dataclass(frozen=True)
class TrialResult:
    """One pruned network of a sweep."""

    pattern: str
    """As text: balanced:32, block:8x8, unstructured, 2:4."""
    wanted: float
    """The sparsity asked for."""
    sparsity: float
    """The share of zeros that it has."""
    seed: int
    score: float
    seconds: float

    @property
    def family(self) -> str:
        """balanced, unstructured, block or 2:4."""
        return self.pattern if self.pattern == "2:4" else self.pattern.partition(":")[0]


def course_figure(history: Sequence[Mapping[str, float]], score: str) -> Any:
    """Loss, and where there are any: sparsity and score, against the step."""
    panels = ["loss", *(key for key in ("sparsity", score) if any(key in entry for entry in history))]
    figure, axes = new_figure(8.0, 2.2 * len(panels), rows=len(panels), sharex=True, squeeze=False)
    for number, (key, axis) in enumerate(zip(panels, axes[:, 0], strict=True)):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axis.plot(*zip(*points, strict=True), color=PALETTE[number], marker="." if len(points) < 30 else None)
        axis.set_title(key)
    axes[-1, 0].set_xlabel("step")
    return figure


def score_figure(trials: Sequence[TrialResult], score: str, dense: float | None) -> Any:
    """Score against sparsity, a line a pattern; of several seeds the mean, and all of them as points."""
    figure, axis = new_figure(8.0, 4.2)
    for number, pattern in enumerate(_in_order(trials)):
        mine = [trial for trial in trials if trial.pattern == pattern and math.isfinite(trial.score)]
        wanted = sorted({trial.wanted for trial in mine})
        groups = [[trial for trial in mine if trial.wanted == value] for value in wanted]
        xs = [float(np.mean([trial.sparsity for trial in group])) for group in groups]
        ys = [float(np.mean([trial.score for trial in group])) for group in groups]
        colour = PALETTE[number % len(PALETTE)]
        axis.plot(xs, ys, color=colour, marker="o", label=pattern)
        axis.scatter([one.sparsity for one in mine], [one.score for one in mine], color=colour, s=10, alpha=0.5)
    if dense is not None:
        axis.axhline(dense, color="black", linewidth=1, linestyle=":", label="dense")
    axis.set_xlabel("share of zeros in the pruned weights")
    axis.set_title(score)
    axis.legend(fontsize=8)
    return figure


def block_size_figure(trials: Sequence[TrialResult], score: str, dense: float | None) -> Any | None:
    """Score of the balanced pattern against its block size, a line a sparsity; None when there is one size alone."""
    mine = [trial for trial in trials if trial.family == "balanced" and trial.pattern.partition(":")[2].isdigit()]
    sizes = sorted({int(trial.pattern.partition(":")[2]) for trial in mine})
    if len(sizes) < 2:
        return None
    figure, axis = new_figure(8.0, 3.8)
    for number, wanted in enumerate(sorted({trial.wanted for trial in mine})):
        means = []
        for size in sizes:
            found = [t.score for t in mine if t.wanted == wanted and t.pattern == f"balanced:{size}"]
            means.append(float(np.mean(found)) if found else math.nan)
        colour = PALETTE[number % len(PALETTE)]
        axis.plot(range(len(sizes)), means, color=colour, marker="o", label=f"{100 * wanted:g} %")
    if dense is not None:
        axis.axhline(dense, color="black", linewidth=1, linestyle=":", label="dense")
    axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axis.set_xlabel("columns of a block")
    axis.set_title(score)
    axis.legend(fontsize=8, title="sparsity")
    return figure


def weight_map_figure(maps: Mapping[str, NDArray[np.float32]], block: int | None = None) -> Any:
    """Corners of one weight matrix under each pattern, side by side: |w| as darkness, white where nothing was kept.

    ``block``: columns of a balanced block, drawn as thin lines.
    """
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure, axes = new_figure(2.6 * columns, 2.8 * rows, rows=rows, columns=columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, weights) in zip(axes.flat, maps.items(), strict=False):
        corner = np.abs(weights[:MAP_SIDE, :MAP_SIDE])
        kept = corner[corner > 0]
        axis.imshow(np.where(corner > 0, corner, np.nan), cmap="Greys", vmin=0, vmax=np.quantile(kept, 0.95) if len(kept) else 1,
                    interpolation="nearest", aspect="equal")  # fmt: skip
        if block is not None:
            for edge in range(block, corner.shape[1], block):
                axis.axvline(edge - 0.5, color=PALETTE[0], linewidth=0.4)
        axis.set_axis_on()
        axis.grid(False)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(True)
        axis.set_title(f"{name}\n{100 * float((corner == 0).mean()):.0f} % zeros", fontsize=9)
    return figure


def _in_order(trials: Sequence[TrialResult]) -> list[str]:
    """Patterns: unstructured first, then balanced and blocks by size."""

    def key(pattern: str) -> tuple[int, int, str]:
        family, _, size = pattern.partition(":")
        first = size.split("x")[0]
        return ("unstructured", "balanced", "2", "block").index(family), int(first) if first.isdigit() else 0, pattern

    return sorted({trial.pattern for trial in trials}, key=key)
