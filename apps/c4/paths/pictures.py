"""Pictures of path planning: loads of leaf-spine links before and after, bandwidth by job, the moment of a failure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from actors.c4.paths.simulate import Operation
from actors.c4.paths.topology import Fabric
from apps.program.report import PALETTE, new_figure


def link_load_figure(fabric: Fabric, uses: Sequence[tuple[str, NDArray[np.floating]]]) -> Figure:
    """A heat map of the uplinks for each (title, utilisation [links]): leaf by row, spine by column; grey: down."""
    leaves, spines = fabric.spec.leaves, fabric.spec.spines
    figure, axes = new_figure(
        1.6 + 3.0 * len(uses), min(9.0, 1.6 + 0.13 * leaves), 1, len(uses), squeeze=False, sharey=True
    )
    image = None
    grid = fabric.leaf_up(np.arange(leaves)[:, None], np.arange(spines))
    for axis, (title, use) in zip(axes[0], uses, strict=True):
        shown = np.ma.masked_array(use[grid], ~fabric.up_alive)
        axis.set_facecolor("#B0B5BA")
        image = axis.imshow(shown, cmap="inferno", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.grid(False)
        axis.set_title(title)
        axis.set_xlabel("spine")
    axes[0][0].set_ylabel("leaf")
    figure.colorbar(image, ax=list(axes[0]), label="utilisation of the uplink")
    return figure


def job_bandwidth_figure(bars: Sequence[tuple[str, NDArray[np.floating]]], unit: str = "Gb/s") -> Figure:
    """Bus bandwidth of each job, a bar for each (label, [jobs])."""
    figure, axis = new_figure(7.5, 3.4)
    width = 0.8 / len(bars)
    for place, (label, rates) in enumerate(bars):
        positions = np.arange(len(rates)) + (place - (len(bars) - 1) / 2) * width
        axis.bar(positions, rates, width, label=label, color=PALETTE[place])
    axis.set_xlabel("job")
    axis.set_ylabel(f"bus bandwidth ({unit})")
    axis.legend(ncols=len(bars), loc="lower right")
    return figure


def failure_figure(runs: Sequence[tuple[str, Sequence[Operation]]], failed_at_s: float, ideal_gbps: float) -> Figure:
    """Mean bus bandwidth of the operations under way over time, a line for each (label, operations), with the failure marked."""
    figure, axis = new_figure(7.5, 3.4)
    end = max((operation.ended_s for _, operations in runs for operation in operations), default=1.0)
    times = np.linspace(0, end, 400)
    for place, (label, operations) in enumerate(runs):
        total, count = np.zeros(len(times)), np.zeros(len(times))
        for operation in operations:
            inside = (times >= operation.began_s) & (times < operation.ended_s)
            total[inside] += operation.busbw_gbps
            count[inside] += 1
        axis.plot(
            times, np.where(count > 0, total / np.maximum(count, 1), np.nan), color=PALETTE[place], label=label, lw=1.8
        )
    axis.axvline(failed_at_s, color=PALETTE[3], ls="--", lw=1.1, label="link fails")
    axis.axhline(ideal_gbps, color=PALETTE[7], ls=":", lw=1.1, label="ideal after it")
    axis.set_xlabel("time (s)")
    axis.set_ylabel("mean bus bandwidth (Gb/s)")
    axis.set_ylim(bottom=0)
    axis.legend(loc="lower left", ncols=2)
    return figure
