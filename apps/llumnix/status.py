"""The live table of ``python -m apps.llumnix status``: instances with their load, requests, migrations."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from apps.llumnix.client import Client, ServerError

MAX_ROWS = 15


def render(status: dict[str, Any], now: float) -> RenderableType:
    """The tables of one answer of /sextant/status; ``now`` in seconds since the epoch."""
    policy, counts = status["policy"], status["counts"]
    moving = "on" if policy["migration"] else "off"
    head = Text(
        f"{status['model']['name']}: {len(status['instances'])} instances, {len(status['requests'])} requests; "
        f"dispatch {policy['dispatch']}, migration {moving}; {counts['dispatched']} dispatched, "
        f"{counts['migrated']} migrated, {counts['migration_failures']} migrations not committed, "
        f"{counts['recovered']} continued after a loss",
        style="bold",
    )
    return Group(head, _instances(status), _requests(status, now), _migrations(status, now))


def _instances(status: dict[str, Any]) -> Table:
    table = Table(title="instances", title_justify="left", expand=True)
    for name in ("instance", "KV blocks", "", "running", "waiting", "freeness", "step ms", "preemptions"):
        table.add_column(name, justify="left" if name in ("instance", "") else "right")
    for entry in status["instances"]:
        share = entry["used_blocks"] / max(entry["total_blocks"], 1)
        freeness = entry["freeness"]
        table.add_row(
            entry["instance_id"] + (" (draining)" if entry["draining"] else ""),
            f"{entry['used_blocks']}/{entry['total_blocks']}",
            "█" * round(20 * share) + "░" * (20 - round(20 * share)),
            str(entry["running"]),
            str(entry["waiting"]),
            "-inf" if freeness is None else f"{freeness:.0f}",
            f"{entry['step_ms']:.1f}",
            str(entry["preemptions"]),
        )
    return table


def _requests(status: dict[str, Any], now: float) -> Table:
    requests = sorted(status["requests"], key=lambda entry: entry["arrival_time"])
    more = f" (the oldest {MAX_ROWS} of {len(requests)})" if len(requests) > MAX_ROWS else ""
    table = Table(title=f"requests{more}", title_justify="left", expand=True)
    for name in ("request", "instance", "age s", "prompt tokens", "priority", "migrations"):
        table.add_column(name, justify="left" if name in ("request", "instance") else "right")
    for entry in requests[:MAX_ROWS]:
        table.add_row(
            entry["request_id"],
            entry["instance_id"],
            f"{now - entry['arrival_time']:.1f}",
            str(entry["prompt_tokens"]),
            str(entry["priority"]),
            str(entry["migrations"]),
        )
    return table


def _migrations(status: dict[str, Any], now: float) -> Table:
    table = Table(title="newest migrations", title_justify="left", expand=True)
    for name in ("request", "from", "to", "ago s", "outcome", "pause ms", "stages", "MB"):
        table.add_column(name, justify="left" if name in ("request", "from", "to", "outcome") else "right")
    for record in reversed(status["migrations"][-MAX_ROWS:]):
        report = record["report"] or {}
        table.add_row(
            record["request_id"] or "?",
            record["source"],
            record["destination"],
            f"{now - record['ended_at']:.1f}",
            record["outcome"] if record["committed"] else f"{record['outcome']}: {report.get('reason') or '?'}",
            _number(report.get("downtime_ms"), ".2f") if record["committed"] else "",
            _number(report.get("stages"), "d"),
            _number(None if report.get("bytes") is None else report["bytes"] / 1e6, ".1f"),
        )
    return table


def _number(value: float | None, pattern: str) -> str:
    return "" if value is None else format(value, pattern)


def show(client: Client, once: bool = False, interval_s: float = 0.5, console: Console | None = None) -> None:
    """Print the table once, or keep it up to date until Ctrl-C or until the server ends (ServerError)."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # into a file or a pipe: names in full
    if once:
        console.print(render(client.status(), time.time()))
        return
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            try:
                live.update(render(client.status(), time.time()), refresh=True)
            except ServerError as error:
                if error.status is None:
                    raise
            time.sleep(interval_s)
