"""The paper's studies as pictures, from trials of one's own and (beside them, paler) published measurements."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from actors.mig.prediction import Measurement
from apps.migperf.sweep.trial import TrialResult
from apps.program.report import PALETTE, Report, new_figure

MOST_WORKLOADS = 8


def add_studies(report: Report, results: Sequence[TrialResult], published: Sequence[Measurement] = ()) -> None:
    """Latency and throughput against batch for each slice, tails, energy; training apart from inference."""
    ran = [result for result in results if result.status in ("ok", "stopped") and result.latency_mean_ms]
    for mode, title in (("infer", "Inference"), ("train", "Training")):
        workloads = sorted(
            {r.point.workload for r in ran if r.point.mode == mode} | {m.workload for m in published if m.mode == mode}
        )
        for workload in workloads[:MOST_WORKLOADS]:
            own = [r for r in ran if (r.point.mode, r.point.workload) == (mode, workload)]
            others = [m for m in published if (m.mode, m.workload) == (mode, workload) and m.latency_ms]
            figure = _latency_and_throughput(own, others)
            report.add_figure(
                f"{title}: {workload}", figure, "Latency of a batch (left) and samples a second of one slice (right)."
            )
    tails = [r for r in ran if r.point.rate_per_s is not None and r.latency_p99_ms]
    if tails:
        report.add_figure("Open loop: tails", _tails(tails), "P50, P95, P99 against the rate of arrival.")
    energies = [r for r in ran if r.energy_j and r.throughput_per_s]
    if energies:
        report.add_figure("Energy", _energy(energies), "Of each slice: its part of the board's energy.")


def _latency_and_throughput(own: Sequence[TrialResult], published: Sequence[Measurement]) -> Any:
    figure, (left, right) = new_figure(10, 3.8, columns=2)
    lines: dict[tuple[str, bool], list[tuple[int, float]]] = defaultdict(list)
    first = {r.point.sequence for r in own} | {m.sequence for m in published}
    sequence = min(first, key=lambda one: (one is None, abs((one or 0) - 64))) if first else None
    for r in own:
        if r.point.sequence == sequence and r.point.rate_per_s is None and r.latency_mean_ms:
            lines[(r.point.profile + (" co-run" if r.point.corun else ""), True)].append(
                (r.point.batch, r.latency_mean_ms)
            )
    for m in published:
        if m.sequence == sequence and m.processes == 1 and m.latency_ms:
            lines[(f"{m.gpu} {m.profile}", False)].append((m.batch, m.latency_ms))
    for number, ((name, ours), points) in enumerate(sorted(lines.items(), key=lambda item: item[0])):
        points.sort()
        style: dict[str, Any] = {
            "color": PALETTE[number % len(PALETTE)],
            "marker": "o" if ours else "",
            "markersize": 4,
        }
        style |= {"linestyle": "-" if ours else "--", "alpha": 1.0 if ours else 0.6}
        left.plot([b for b, _ in points], [ms for _, ms in points], label=name, **style)
        right.plot([b for b, _ in points], [b / ms * 1e3 for b, ms in points], **style)
    for axes, text in ((left, "latency (ms)"), (right, "samples/s")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("batch")
        axes.set_ylabel(text)
    left.legend(fontsize=7)
    return figure


def _tails(results: Sequence[TrialResult]) -> Any:
    figure, axes = new_figure(8, 3.8)
    lines: dict[str, list[TrialResult]] = defaultdict(list)
    for r in results:
        lines[f"{r.point.workload} {r.point.profile}"].append(r)
    for number, (name, members) in enumerate(sorted(lines.items())):
        members.sort(key=lambda r: r.point.rate_per_s or 0)
        rates = [r.point.rate_per_s for r in members]
        for style, field in (("-", "latency_p99_ms"), ("--", "latency_p95_ms"), (":", "latency_p50_ms")):
            axes.plot(rates, [getattr(r, field) for r in members], style, color=PALETTE[number % len(PALETTE)],
                      label=name if style == "-" else None)  # fmt: skip
    axes.set_xlabel("batches that arrive a second")
    axes.set_ylabel("latency (ms)")
    axes.set_yscale("log")
    axes.legend(fontsize=7)
    return figure


def _energy(results: Sequence[TrialResult]) -> Any:
    figure, axes = new_figure(8, 3.8)
    names = [f"{r.point.workload} {r.point.profile} b{r.point.batch}" for r in results]
    per_sample = [(r.energy_j or 0) / max((r.throughput_per_s or 0) * r.seconds, 1e-9) * 1e3 for r in results]
    errors = [value * (r.energy_error or 0) for value, r in zip(per_sample, results, strict=True)]
    axes.barh(range(len(names)), per_sample, xerr=errors, color=PALETTE[2])
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("millijoules a sample")
    return figure


def sharing(rows: Sequence[tuple[str, float, float]]) -> Any:
    """(way of sharing, P99 shared / P99 alone, throughput together / throughput alone) as bars."""
    figure, (left, right) = new_figure(9, 3.4, columns=2)
    names = [name for name, _, _ in rows]
    for axes, values, text in (
        (left, [tail for _, tail, _ in rows], "P99 shared / P99 alone"),
        (right, [speed for _, _, speed in rows], "samples/s together / alone"),
    ):
        axes.bar(range(len(names)), values, color=PALETTE[: len(names)])
        axes.set_xticks(range(len(names)), names)
        axes.axhline(1.0, color="#7F7F7F", linewidth=0.8)
        axes.set_ylabel(text)
    return figure
