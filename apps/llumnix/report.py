"""The report of one or more replays: tables on the terminal, result.json, CSV, pictures and one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from apps.llumnix.history import short_names
from apps.llumnix.pictures import downtime_figure, latency_figure, load_figure, residence_figure
from apps.llumnix.records import ReplayResult, Summary
from apps.program.report import Report, print_table
from apps.program.run_folder import RunFolder

_LATENCIES = (
    ("time to first token", "s", "ttft_s", 1.0),
    ("time per output token", "ms", "tpot_s", 1e3),
    ("end to end", "s", "e2e_s", 1.0),
    ("longest pause", "ms", "longest_gap_s", 1e3),
)
_COUNTS: tuple[tuple[str, Callable[[Summary], Any]], ...] = (
    ("requests", lambda told: told.requests),
    ("errors", lambda told: told.errors),
    ("preemptions", lambda told: told.preemptions),
    ("migrations", lambda told: told.migrations),
    ("migrations not committed", lambda told: told.migration_failures),
    ("pause of a migration, P50 (ms)", lambda told: told.migration_downtime_ms.p50),
    ("tokens per second", lambda told: told.tokens_per_s),
    ("duration (s)", lambda told: told.duration_s),
    ("client's own lag, P99 (ms)", lambda told: 1e3 * told.lag_s.p99),
)


def latency_rows(results: Sequence[ReplayResult]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the latency table: a row a figure, a column an arm, and of two arms the ratio first / second."""
    summaries = [result.summary() for result in results]
    rows: list[list[Any]] = []
    for title, unit, name, scale in _LATENCIES:
        for part, label in (("mean", "mean"), ("p50", "P50"), ("p99", "P99")):
            values = [scale * getattr(getattr(told, name), part) for told in summaries]
            row: list[Any] = [f"{title}, {label} ({unit})", *values]
            if len(values) == 2:
                row.append(values[0] / values[1] if values[1] else float("nan"))
            rows.append(row)
    columns = ["latency", *(result.name for result in results)]
    return [*columns, "ratio"] if len(results) == 2 else columns, rows


def count_rows(results: Sequence[ReplayResult]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table of counts: a row a count, a column an arm."""
    summaries = [result.summary() for result in results]
    rows = [[title, *(value(told) for told in summaries)] for title, value in _COUNTS]
    return ["count", *(result.name for result in results)], rows


def print_summaries(results: Sequence[ReplayResult]) -> None:
    """Both tables on the terminal."""
    print_table(*latency_rows(results), title="Latency from the scheduled arrival")
    print_table(*count_rows(results), title="Counts")


def write_report(
    folder: RunFolder,
    results: Sequence[ReplayResult],
    *,
    title: str,
    summary: str = "",
    transcript: str | None = None,
    extra: dict[str, Any] | None = None,
) -> str:
    """Writes everything about ``results`` into the run folder; returns the path of the HTML file.

    Args:
        summary: a sentence below the title; made from the results when empty.
        transcript: text shown as typed in front (the demo's chat with its hops).
        extra: more keys for result.json.

    Raises:
        UserError: the folder cannot be written.
    """
    first = results[0]
    summary = summary or f"{len(first.records)} requests: {first.origin}. Prompts: {first.prompts}, seed {first.seed}."
    report = Report(title, summary)
    if transcript:
        report.add_code("One request, moved while it streams", transcript)
    report.add_table(
        "Latency", *latency_rows(results), caption="From the scheduled arrival; errors count in no latency."
    )
    report.add_table("Counts", *count_rows(results))
    report.add_figure("Latency distributions", latency_figure(results), "Share of requests at or below each latency.")
    names = sorted({name for result in results for name in result.history.instance_ids})
    if any(result.history.samples for result in results):
        report.add_figure("Load of each instance", load_figure(results), "Sampled by the scheduler.", name="load")
    if any(result.history.stays for result in results):
        told = "Grey: no token yet (queued or in prefill). A line changes colour where the request moved."
        report.add_figure("Where each request lived", residence_figure(results), told, name="residence")
    pauses = downtime_figure(results)
    if pauses is not None:
        report.add_figure(
            "Pause of migrated requests", pauses, "From the last step at the source to the first at the destination.",
            name="migration_pause",
        )  # fmt: skip
    if names:
        labels = short_names(names)
        report.add_table("Instances", ["in the pictures", "name"], [[labels[name], name] for name in names])
    for failure in dict.fromkeys(text for result in results for text in result.error_samples):
        report.add_text("Errors", failure)
    for number, result in enumerate(results):
        suffix = "" if len(results) == 1 else f"_{number + 1}_{_slug(result.name)}"
        folder.write_text(f"requests{suffix}.csv", result.csv())
    folder.write_result(_result(results) | (extra or {}))
    return report.write(folder)


def _result(results: Sequence[ReplayResult]) -> dict[str, Any]:
    return {
        "arms": [
            {
                "name": result.name,
                "trace": result.origin,
                "prompts": result.prompts,
                "seed": result.seed,
                "started_at": result.started_at,
                "summary": result.summary(),
                "errors": result.error_samples,
                "migrations": result.history.migrations,
            }
            for result in results
        ]
    }


def _slug(name: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in name.lower()).strip("_")
