"""Pictures: loss against steps and against time, with bands over the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from apps.mcmisp.statistics import mean_interval
from apps.program.report import PALETTE, new_figure

Course = Sequence[Mapping[str, float]]


def course_picture(courses: Mapping[str, Course]) -> Any:
    """Training and validation loss of single runs."""
    figure, axes = new_figure(8, 3.6)
    for colour, (name, course) in zip(PALETTE, courses.items(), strict=False):
        axes.plot(
            [e["step"] for e in course], [e["loss"] for e in course], color=colour, alpha=0.4, label=f"{name}, training"
        )
        evaluated = [e for e in course if "validation_loss" in e]
        axes.plot(
            [e["step"] for e in evaluated],
            [e["validation_loss"] for e in evaluated],
            color=colour,
            marker=".",
            label=f"{name}, validation",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("nats per masked word")
    axes.legend()
    return figure


def band_picture(runs: Mapping[str, Sequence[Course]], against: str, label: str) -> Any:
    """Validation loss of each arm against ``against`` (a key of the entries): mean over seeds and its 95 % interval."""
    figure, axes = new_figure(8, 4.2)
    for colour, (arm, courses) in zip(PALETTE, runs.items(), strict=False):
        points = [[(e[against], e["validation_loss"]) for e in course if "validation_loss" in e] for course in courses]
        count = min(map(len, points))
        x = np.array([[p[0] for p in one[:count]] for one in points]).mean(0)
        y = np.array([[p[1] for p in one[:count]] for one in points])
        axes.plot(x, y.mean(0), color=colour, label=arm)
        if len(y) > 1:
            low, high = zip(*(mean_interval(column) for column in y.T), strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel(label)
    axes.set_ylabel("validation loss, nats per masked word")
    axes.legend()
    return figure


__all__ = ["band_picture", "course_picture"]
