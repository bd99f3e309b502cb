"""Pictures of replays: loads over time, where each request lived, latency distributions, migration pauses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from apps.llumnix.history import Stay, short_names
from apps.llumnix.records import ReplayResult
from apps.program.report import PALETTE, new_figure

# Instances and arms never share a colour, so that a colour has one meaning in a report.
INSTANCE_COLORS = (PALETTE[0], PALETTE[1], PALETTE[4], PALETTE[5], PALETTE[6], PALETTE[7])
ARM_STYLES = ((PALETTE[3], "--"), (PALETTE[2], "-"), ("#000000", ":"), (PALETTE[4], "-."))
WAIT_COLOR, MARK_COLOR = "#C4CAD0", "#111111"


def _colors(instance_ids: Sequence[str]) -> dict[str, str]:
    return {name: INSTANCE_COLORS[index % len(INSTANCE_COLORS)] for index, name in enumerate(instance_ids)}


def _instances(results: Sequence[ReplayResult]) -> list[str]:
    return sorted({name for result in results for name in result.history.instance_ids})


def _end_s(results: Sequence[ReplayResult]) -> float:
    return max(result.duration_s for result in results)


def load_figure(results: Sequence[ReplayResult]) -> Figure:
    """KV blocks, batch and queue of each instance over time; one column an arm, equal axes."""
    names = _instances(results)
    colors, labels = _colors(names), short_names(names)
    columns = len(results)
    figure, axes = new_figure(5.2 * columns + 0.6, 6.6, 3, columns, sharex=True, sharey="row", squeeze=False)
    rows = (
        ("KV blocks used (%)", lambda s: 100 * s.used_blocks / s.total_blocks),
        ("requests running", lambda s: s.running),
        ("requests waiting", lambda s: s.waiting),
    )
    for column, result in enumerate(results):
        for row, (title, value) in enumerate(rows):
            axis = axes[row][column]
            for name in names:
                samples = [sample for sample in result.history.samples if sample.instance_id == name]
                times = [sample.at_s - result.started_at for sample in samples]
                axis.plot(times, [value(s) for s in samples], color=colors[name], label=labels[name],
                          lw=1.6, drawstyle="steps-post")  # fmt: skip
            if column == 0:
                axis.set_ylabel(title)
        axes[0][column].set_title(result.name, loc="left", fontsize=11)
        axes[2][column].set_xlabel("time since the first arrival (s)")
    axes[0][0].set_xlim(0, _end_s(results))
    axes[0][0].set_ylim(0, 103)
    for row in (1, 2):  # only now: a limit set on one axis would stop the shared ones from growing with their data
        axes[row][0].set_ylim(0, max(1.0, 1.05 * max(axis.dataLim.y1 for axis in axes[row])))
        axes[row][0].yaxis.get_major_locator().set_params(integer=True)
    handles, texts = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper right", frameon=False, ncols=len(names))
    return figure


def residence_figure(results: Sequence[ReplayResult]) -> Figure:
    """A line a request from its arrival to its last token, coloured by the instance that has it; migrations are marked."""
    names = _instances(results)
    colors, labels = _colors(names), short_names(names)
    most = max(len(result.records) for result in results)
    height = min(11.0, max(4.0, 1.6 + 0.055 * most))
    figure, axes = new_figure(
        5.2 * len(results) + 0.6, height, 1, len(results), sharex=True, sharey=True, squeeze=False
    )
    thickness = max(0.8, min(6.0, 0.75 * 72 * (height - 1.4) / max(most, 1)))
    for axis, result in zip(axes[0], results, strict=True):
        _draw_residence(axis, result, colors, thickness)
        axis.set_title(result.name, loc="left", fontsize=11)
        axis.set_xlabel("time since the first arrival (s)")
    axes[0][0].set_ylabel("request, in order of arrival")
    axes[0][0].set_xlim(0, _end_s(results))
    axes[0][0].set_ylim(most - 0.3, -0.7)
    proxies: list[Any] = [axes[0][0].plot([], [], lw=5, color=colors[name], label=labels[name])[0] for name in names]
    proxies.append(axes[0][0].plot([], [], lw=5, color=WAIT_COLOR, label="no token yet")[0])
    if any(one.committed for result in results for one in result.history.migrations):
        proxies.append(axes[0][0].plot([], [], "|", ms=9, mew=1.6, color=MARK_COLOR, label="migration")[0])
    figure.legend(handles=proxies, loc="outside upper right", frameon=False, ncols=len(proxies))
    return figure


def _draw_residence(axis: Any, result: ReplayResult, colors: dict[str, str], thickness: float) -> None:
    stays: dict[str, list[Stay]] = {}
    for stay in result.history.stays:
        stays.setdefault(stay.request_id, []).append(stay)
    for row, record in enumerate(result.records):
        end = record.last_s if math.isfinite(record.last_s) else result.duration_s
        first = record.first_s if math.isfinite(record.first_s) else end
        axis.hlines(row, record.due_s, first, color=WAIT_COLOR, lw=thickness)
        for stay in stays.get(record.request_id, ()):
            begin = max(stay.begin_s - result.started_at, first)
            until = min(stay.end_s - result.started_at, end)
            if until > begin:
                axis.hlines(row, begin, until, color=colors[stay.instance_id], lw=thickness)
            if stay.cause == "migration":
                at = stay.begin_s - result.started_at
                axis.plot([at], [row], "|", ms=max(5.0, 1.6 * thickness), mew=1.3, color=MARK_COLOR)
    axis.grid(axis="y", visible=False)


def latency_figure(results: Sequence[ReplayResult]) -> Figure:
    """Cumulative distributions of TTFT, TPOT, the longest pause and end-to-end latency of the answered requests."""
    figure, axes = new_figure(10.6, 6.4, 2, 2, sharey=True)
    panels = (
        ("time to first token (s)", lambda r: r.ttft_s),
        ("time per output token (ms)", lambda r: 1e3 * r.tpot_s),
        ("end to end (s)", lambda r: r.e2e_s),
        ("longest pause in a stream (ms)", lambda r: 1e3 * r.longest_gap_s),
    )
    for axis, (title, value) in zip(axes.flat, panels, strict=True):
        for index, result in enumerate(results):
            found = [value(record) for record in result.records if record.error is None]
            values = np.sort([one for one in found if math.isfinite(one) and one > 0])
            if len(values):
                color, style = ARM_STYLES[index % len(ARM_STYLES)]
                share = np.arange(1, len(values) + 1) / len(values)
                x, y = np.concatenate([values[:1], values]), np.concatenate([[0.0], share])
                axis.step(x, 100 * y, where="post", color=color, ls=style, lw=1.9, label=result.name)
        axis.set_xlabel(title)
        axis.set_ylim(0, 101)
        high = axis.get_xlim()[1]
        if high > 8 * axis.dataLim.x0 > 0:
            axis.set_xscale("log")
            plain_log_ticks(axis)
        else:
            axis.set_xlim(0, high)
    for row in axes:
        row[0].set_ylabel("requests (%)")
    handles, texts = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper right", frameon=False, ncols=max(1, len(results)))
    return figure


def plain_log_ticks(axis: Any) -> None:
    """Numbers such as 0.2 and 50 on a logarithmic axis, and at least three of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_xlim()
    decades = math.log10(high / low)
    steps = (1.0,) if decades > 4 else (1.0, 3.0) if decades > 2 else (1.0, 2.0, 5.0) if decades > 0.7 else range(1, 10)
    axis.xaxis.set_major_locator(LogLocator(subs=tuple(map(float, steps)), numticks=20))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def downtime_figure(results: Sequence[ReplayResult]) -> Figure | None:
    """Histogram of the pauses of committed migrations beside the decode step; None when there was no migration."""
    pauses = np.asarray(
        [m.downtime_ms for r in results for m in r.history.migrations if m.committed and m.downtime_ms > 0]
    )
    if not len(pauses):
        return None
    steps = [
        s.step_ms
        for r in results
        for s in r.history.samples
        if s.running and math.isfinite(s.step_ms) and s.step_ms > 0
    ]
    figure, axis = new_figure(8.0, 3.4)
    low, high = pauses.min(), max(pauses.max(), float(np.median(steps)) if steps else 0.0, 2 * pauses.min())
    axis.hist(pauses, bins=np.geomspace(low * 0.9, high * 1.1, 40), color=PALETTE[2], edgecolor="white", lw=0.5)
    axis.set_xscale("log")
    axis.set_xlim(low * 0.7, high * 1.4)
    plain_log_ticks(axis)
    axis.set_xlabel("pause of the migrated request (ms)")
    axis.set_ylabel("migrations")
    axis.yaxis.get_major_locator().set_params(integer=True)
    top = axis.get_ylim()[1] * 1.22
    axis.set_ylim(0, top)
    marks = [("median pause", float(np.median(pauses)), "-")]
    if steps:
        marks.append(("median decode step", float(np.median(steps)), "--"))
    for name, value, style in marks:
        axis.axvline(value, color="#333333", ls=style, lw=1.3, label=f"{name}: {value:.3g} ms")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", frameon=False, ncols=2)
    return figure
