"""The verb `watch`: a running training under C4 live in the terminal: ranks by node, delays, who waits for whom, verdicts."""

from __future__ import annotations

import math
import sys
import time
from typing import Annotated

import numpy as np
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from actors.c4.ports import CLEARED, DelayMatrix, MasterStatus, NumberedVerdict, RankStatus, Wait
from apps.c4.attach import running_job
from apps.c4.config import C4Config
from apps.program.errors import UserError

ANSWER_WAIT_S = 10.0
MAX_RANKS = 64
MAX_MATRIX = 16
MAX_VERDICTS = 8
_STATE_STYLES = {"stopped": "bold red", "gone": "bold red", "unknown": "yellow"}


def watch(
    config: C4Config,
    run: Annotated[str | None, typer.Option(help="Name of the run; not needed when only one runs.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Print once and end.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between updates.")] = 0.5,
) -> None:
    """Show a training that runs under C4, live."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # into a file or a pipe: names in full
    with running_job(config.ray, run) as (name, master):
        if once or not sys.stdout.isatty():
            console.print(render(_status(name, master), time.time()))
            return
        with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                live.update(render(_status(name, master), time.time()), refresh=True)
                time.sleep(interval)


def _status(name: str, master) -> MasterStatus:  # type: ignore[no-untyped-def]
    import ray

    try:
        return ray.get(master.status.remote(), timeout=ANSWER_WAIT_S)
    except ray.exceptions.RayActorError as error:
        raise UserError(f"The run {name} has ended.") from error
    except ray.exceptions.GetTimeoutError as error:
        raise UserError(f"The master of the run {name} did not answer within {ANSWER_WAIT_S:g} s.") from error


def render(status: MasterStatus, now: float) -> RenderableType:
    """Everything of one status; ``now`` in seconds since the epoch."""
    parts: list[RenderableType] = [_head(status), _ranks(status.ranks)]
    parts += [_matrix(one) for one in status.delays[:1]]
    if status.waiting:
        parts.append(_waiting(status.waiting))
    parts.append(_verdicts(status.verdicts, now))
    if status.quarantine:
        parts.append(_quarantine(status))
    parts.append(_monitors(status))
    return Group(*parts)


def _head(status: MasterStatus) -> Text:
    if status.state == "none":
        return Text(f"{status.run}: no worker has started yet", style="bold")
    words = {"watching": "training", "condemned": "its workers are being ended", "ended": "ended"}
    operation = "" if math.isnan(status.operation_s) else f", an operation takes {status.operation_s * 1e3:.1f} ms"
    return Text(
        f"{status.run}: generation {status.generation}, {status.world_size} ranks, {words.get(status.state, status.state)} "
        f"for {_seconds(status.running_s)}{operation}",
        style="bold",
    )


def _ranks(ranks: tuple[RankStatus, ...]) -> Table:
    more = f" (the first {MAX_RANKS} of {len(ranks)})" if len(ranks) > MAX_RANKS else ""
    table = Table(title=f"ranks by node{more}", title_justify="left", expand=True)
    left = ("node", "process", "open operation")
    for name in ("node", "rank", "pid", "process", "heartbeat s", "operations", "open operation", "cpu"):
        table.add_column(name, justify="left" if name in left else "right")
    before = None
    ordered = sorted(ranks, key=lambda one: (min(r.rank for r in ranks if r.node_id == one.node_id), one.rank))
    for one in ordered[:MAX_RANKS]:
        doing = "-"
        if one.open is not None:
            doing = f"{one.open.operation} #{one.open.sequence} of group {one.open.group}, {one.open.age_s:.1f} s"
        late = not math.isnan(one.heartbeat_age_s) and one.heartbeat_age_s > 0.5
        table.add_row(
            one.node_name if one.node_id != before else "",
            str(one.rank),
            str(one.pid),
            Text(one.process, style=_STATE_STYLES.get(one.process, "")),
            Text(_number(one.heartbeat_age_s, ".2f"), style="bold red" if late else ""),
            f"{one.completed:,}",
            Text(doing, style="yellow" if one.open is not None and one.open.age_s > 1 else ""),
            _number(one.cpu_share, ".0%"),
        )
        before = one.node_id
    return table


def _matrix(delays: DelayMatrix) -> Table:
    """Milliseconds per MiB; a cell over twice the median is hot."""
    shown = delays.ranks[:MAX_MATRIX]
    values = delays.ms_per_mib[: len(shown), : len(shown)]
    known = values[~np.isnan(values)]
    median = float(np.median(known)) if len(known) else math.nan
    of = f" (the first {MAX_MATRIX} of {len(delays.ranks)} ranks)" if len(delays.ranks) > MAX_MATRIX else ""
    table = Table(title=f"delay matrix, ms per MiB, from row to column{of}", title_justify="left")
    table.add_column("", justify="right")
    for rank in shown:
        table.add_column(str(rank), justify="right")
    for row, rank in enumerate(shown):
        cells = [
            Text("·" if math.isnan(value) else f"{value:.2f}", style="bold red" if value > 2 * median else "")
            for value in values[row]
        ]
        table.add_row(str(rank), *cells)
    return table


def _waiting(waits: tuple[Wait, ...]) -> Text:
    on: dict[int, list[int]] = {}
    for wait in waits:
        on.setdefault(wait.on, []).append(wait.rank)
    lines = [
        f"rank {culprit} is waited for by {', '.join(map(str, sorted(set(ranks))))}"
        for culprit, ranks in sorted(on.items(), key=lambda item: -len(item[1]))[:5]
    ]
    return Text("\n".join(lines), style="yellow")


def _verdicts(verdicts: tuple[NumberedVerdict, ...], now: float) -> Table:
    table = Table(title="newest verdicts", title_justify="left", expand=True)
    for name in ("#", "ago s", "class", "culprit", "node", "found after s", "decision", "evidence"):
        table.add_column(name, justify="right" if name in ("#", "ago s", "found after s") else "left")
    for one in reversed(verdicts[-MAX_VERDICTS:]):
        verdict = one.verdict
        style = {"evict": "bold red", CLEARED: "dim"}.get(one.action, "")
        table.add_row(
            str(one.number),
            f"{now - one.named_at:.0f}",
            f"{verdict.fault_class} ({verdict.kind})",
            str(verdict.culprit),
            ", ".join(verdict.culprit.nodes),
            f"{verdict.detection_s:.2f}",
            f"{one.action}: {one.reason}",
            verdict.evidence[0] if verdict.evidence else "",
            style=style,
        )
    return table


def _quarantine(status: MasterStatus) -> Table:
    names = {node.node_id: node.node_name for node in status.nodes}
    table = Table(title="quarantine", title_justify="left")
    table.add_column("node")
    table.add_column("why")
    for node_id, reason in status.quarantine.items():
        table.add_row(names.get(node_id) or node_id, reason)
    return table


def _monitors(status: MasterStatus) -> Text:
    agents = len(status.nodes)
    restarts = sum(node.agent_restarts for node in status.nodes)
    oldest = max((node.report_age_s for node in status.nodes if not math.isnan(node.report_age_s)), default=math.nan)
    per_rank = status.bytes_per_s / status.world_size if status.world_size else 0.0
    agent_ms = max((node.agent_cost_ms_per_s for node in status.nodes), default=0.0)
    return Text(
        f"{agents} agents ({restarts} restarts), oldest report {_number(oldest, '.1f')} s; {per_rank:.0f} B/s a rank; "
        f"agents take up to {agent_ms / 10:.1f} % of a core, judging {status.cost_ms_per_s / 10:.1f} %",
        style="dim",
    )


def _number(value: float, pattern: str) -> str:
    return "" if math.isnan(value) else format(value, pattern)


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min"
