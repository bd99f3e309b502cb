"""The picture of ``benchmarks.balanced_kernels_cpu``: speed over dense beside what the bytes allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def speedups(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A figure of matplotlib: bars of measured ratio and byte ratio for each row that has both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if "byte_ratio" in row]
    figure, axes = plt.subplots(figsize=(8, 4))
    places = range(len(shown))
    axes.bar(
        [p - 0.2 for p in places],
        [row["byte_ratio"] for row in shown],
        0.4,
        color="#c8d3df",
        label="bytes dense / ours",
    )
    axes.bar(
        [p + 0.2 for p in places], [row["ratio"] for row in shown], 0.4, color="#24598f", label="time dense / ours"
    )
    axes.set_xticks(list(places), [f"{row['pattern']}\n{row['values']}\n{row['index']}" for row in shown], fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("times dense fp32")
    axes.set_title("Balanced SpMV, batch 1, one thread, cold cache")
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    plt.close(figure)
    return figure
