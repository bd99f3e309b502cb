"""The verb `month`: a month of a large job with faults, in four rows, under C4 and under Ray Train's defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from apps.c4.config import C4Config
from apps.c4.fleet.month import Month, MonthConfig, Row, interval, read_measured, replay
from apps.program.run_folder import RunFolder

NAMES = {"c4": "C4 (Sextant)", "default": "Ray Train's defaults"}


def month(
    config: C4Config,
    measured: Annotated[
        Path | None,
        typer.Option(help="JSON of benchmarks.c4_diagnosis: detection times are drawn from its live trials."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Root of the run folders (default: runs).")] = None,
) -> int:
    """Replay a month of faults: share of the time lost, by row, with intervals. Assumptions: section `month`."""
    from apps.program.run_folder import new_run_folder

    show_month(config.month, new_run_folder("c4", out, config), measured)
    return 0


def show_month(config: MonthConfig, folder: RunFolder, measured: Path | None = None) -> None:
    """Replays, prints the table, and writes result and report into ``folder``."""
    from apps.program.config import dump_config
    from apps.program.report import Report, print_table

    times = read_measured(measured) if measured is not None else None
    months = replay(config, times)
    columns, rows = month_rows(months)
    origin = f"detection times from {times.origin}" if times else "assumed detection times"
    title = f"{config.gpus} GPUs, {config.days:g} days, {config.faults} faults: share of the time lost (%), mean and 5 to 95 %"
    print_table(columns, rows, title=title)
    print(f"A simulation: {config.months} replays, seed {config.seed}, {origin}; every assumption is in the report.")
    folder.write_result(
        {"rows": [dict(zip(columns, row, strict=True)) for row in rows], "months": config.months, "origin": origin}
    )
    report = Report("C4: a month of a large job", f"{title}. A simulation ({origin}), not a measurement.")
    report.add_table("Time lost", columns, rows)
    report.add_figure("Time lost", month_figure(months), "Mean over the replays, logarithmic; whiskers: 5 to 95 %.")
    report.add_code("Assumptions", dump_config(config))
    print(f"Report: {report.write(folder)}")


def month_rows(months: Mapping[str, Sequence[Month]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table: per cent of the month by row and arm, interval, and the default's over ours."""
    columns = ["", *(part for name in NAMES.values() for part in (f"{name}, %", "5 to 95 %")), "ratio"]
    rows: list[list[Any]] = []
    for label, pick in [
        *((row.value, lambda one, row=row: one.shares[row]) for row in Row),
        ("total", lambda one: one.total),
    ]:
        means, cells = [], []
        for arm in NAMES:
            mean, low, high = interval([100 * pick(one) for one in months[arm]])
            means.append(mean)
            cells += [mean, f"{low:.3g} to {high:.3g}"]
        rows.append([label, *cells, means[1] / means[0] if means[0] > 0 else None])
    stops: list[Any] = ["restarts"]
    for arm in NAMES:
        mean, low, high = interval([float(one.restarts) for one in months[arm]])
        stops += [mean, f"{low:.0f} to {high:.0f}"]
    rows.append([*stops, None])
    return columns, rows


def month_figure(months: Mapping[str, Sequence[Month]]) -> Any:
    """Bars of both arms for each row."""
    from apps.program.report import PALETTE, new_figure

    figure, axis = new_figure(8.0, 3.6)
    labels = [*(row.value for row in Row), "total"]
    for number, (arm, name) in enumerate(NAMES.items()):
        spans = [interval([100 * one.shares[row] for one in months[arm]]) for row in Row]
        spans.append(interval([100 * one.total for one in months[arm]]))
        mean = [max(span[0], 1e-4) for span in spans]
        whiskers = [
            [max(m - s[1], 0) for m, s in zip(mean, spans, strict=True)],
            [max(s[2] - m, 0) for m, s in zip(mean, spans, strict=True)],
        ]
        places = [index + 0.38 * number for index in range(len(labels))]
        axis.bar(places, mean, 0.36, yerr=whiskers, color=PALETTE[number], label=name, capsize=3)
    axis.set_yscale("log")
    axis.set_xticks([index + 0.19 for index in range(len(labels))], labels)
    axis.set_ylabel("% of the month")
    axis.legend()
    return figure
