"""Open-loop load generator: sends a trace's requests to a server at their times, whatever has been answered, and measures.

Latencies count from the moment at which the trace wanted the request sent, so a slow server (or client) cannot hide its delay
by slowing the load (no coordinated omission); how far the client itself lagged is reported beside them. ``replay`` is a
verb of ``python -m apps.llumnix``; ``demo`` calls ``run_replay`` once for each arm.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import httpx
import numpy as np
import typer

from apps.llumnix.client import Client, ServerError
from apps.llumnix.config import LlumnixConfig
from apps.llumnix.history import read_history, read_totals
from apps.llumnix.load_client import open_client, served_model, stream_events
from apps.llumnix.prompts import Prompts, TextPrompts, TokenPrompts
from apps.llumnix.records import ReplayResult, RequestRecord
from apps.llumnix.trace import (
    Arrival,
    Trace,
    TraceError,
    fit_lengths,
    generate_trace,
    read_trace,
    scale_lengths,
    slice_trace,
)

SETTLE_S = 0.6
"""Pause after the last answer, so that the instances' last loads and the ends of migrations are in the history."""


@dataclass(frozen=True)
class Load:
    """How the requests of a trace are made: same values, same requests."""

    prompts: Prompts
    seed: int = 0
    temperature: float = 0.0
    timeout_s: float = 600.0
    """Longest silence of the server before a request counts as failed."""


Progress = Callable[[int, int, int, int], None]
"""Called with (sent, ended, failed, tokens so far) whenever one of them changes."""


def run_replay(
    url: str, trace: Trace, load: Load, *, name: str = "replay", progress: Progress | None = None
) -> ReplayResult:
    """Sends ``trace`` to the server at ``url`` and waits for every answer.

    Arrivals come on schedule regardless of completions. A request that fails is recorded with its error; the replay goes on.

    Raises:
        UserError: the server cannot be reached, serves no model, or a request is longer than its context.
    """
    with Client(url) as client:
        model, max_model_len = context_of(url)
        if (longest := max(one.prompt_tokens + one.output_tokens for one in trace)) > max_model_len:
            raise TraceError(
                f"A request of the trace has {longest} tokens, the model's longest sequence {max_model_len}."
            )
        # Bodies are made before the clock starts: tokenizing must not delay the arrivals.
        bodies = [_body(model, load, index, arrival) for index, arrival in enumerate(trace)]
        before = read_totals(client)
        wall = time.time()
        records, duration = asyncio.run(_send(url, trace, bodies, load, progress))
        time.sleep(SETTLE_S)
        after = read_totals(client)
        history = read_history(client, wall)
    errors = dict.fromkeys(record.error for record in records if record.error)
    return ReplayResult(
        name=name,
        origin=trace.origin,
        prompts=load.prompts.description,
        seed=load.seed,
        started_at=wall,
        duration_s=duration,
        records=tuple(records),
        totals=None if before is None or after is None else after - before,
        history=history,
        error_samples=tuple(errors)[:5],
    )


def context_of(url: str) -> tuple[str, int]:
    """(name, longest prompt + output in tokens) of the model that the server at ``url`` serves; raises UserError."""

    async def ask() -> tuple[str, int]:
        async with open_client(url, 10.0) as client:
            return await served_model(client)

    return asyncio.run(ask())


async def _send(
    url: str, trace: Trace, bodies: Sequence[bytes], load: Load, progress: Progress | None
) -> tuple[list[RequestRecord], float]:
    async with open_client(url, load.timeout_s) as client:
        run = _Run(client, progress)
        records = await run.all(trace, bodies)
        return records, time.perf_counter() - run.start


class _Run:
    """One replay under way."""

    def __init__(self, client: httpx.AsyncClient, progress: Progress | None):
        self._client, self._progress = client, progress
        self._sent = self._ended = self._failed = self._tokens = 0
        self.start = 0.0

    async def all(self, trace: Trace, bodies: Sequence[bytes]) -> list[RequestRecord]:
        self.start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = []
            for index, (arrival, body) in enumerate(zip(trace, bodies, strict=True)):
                # Sleep even when late, for 0 s: the requests under way must be read between two that are due together.
                await asyncio.sleep(max(0.0, self.start + arrival.arrival_s - time.perf_counter()))
                tasks.append(group.create_task(self._one(index, arrival, body)))
        return [task.result() for task in tasks]

    def _now(self) -> float:
        return time.perf_counter() - self.start

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._sent, self._ended, self._failed, self._tokens)

    async def _one(self, index: int, arrival: Arrival, body: bytes) -> RequestRecord:
        sent = self._now()
        self._sent += 1
        request_id, generated, cached, error = "", 0, 0, None
        first = last = longest_gap = float("nan")
        try:
            async for event in stream_events(self._client, "/v1/completions", body):
                request_id = request_id or f"{event.get('id', '')}-0"
                if event.get("choices"):
                    now = self._now()
                    if np.isnan(first):
                        first, longest_gap = now, 0.0
                    else:
                        longest_gap = max(longest_gap, now - last)
                    last = now
                    self._tokens += 1
                    self._tell()
                if event.get("usage"):
                    generated = int(event["usage"]["completion_tokens"])
                    cached = int((event["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
            if generated != arrival.output_tokens:
                error = f"{generated} tokens came, {arrival.output_tokens} were asked for."
        except ServerError as failure:
            error = str(failure)
        self._ended += 1
        self._failed += error is not None
        self._tell()
        return RequestRecord(
            index=index,
            request_id=request_id,
            prompt_tokens=arrival.prompt_tokens,
            output_tokens=arrival.output_tokens,
            generated=generated,
            due_s=arrival.arrival_s,
            sent_s=sent,
            first_s=first,
            last_s=last,
            longest_gap_s=longest_gap,
            cached_tokens=cached,
            error=error,
        )


def _body(model: str, load: Load, index: int, arrival: Arrival) -> bytes:
    body = {
        "model": model,
        "prompt": load.prompts.make(index, arrival.prompt_tokens),
        "max_tokens": arrival.output_tokens,
        "ignore_eos": True,
        "temperature": load.temperature,
        "seed": load.seed * 1_000_003 + index,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body, separators=(",", ":")).encode()


# ---- what a run needs, found or made


def choose_prompts(model: str | None, seed: int) -> Prompts:
    """Real text when the tokenizer of ``model`` (as in engine.model) can be loaded here, else seeded token ids."""
    if model is not None:
        try:
            from actors.llumnix.engine.loading import ModelLoadError, load_tokenizer

            return TextPrompts(load_tokenizer(model), seed)
        except ModelLoadError:
            pass  # the server may have a model that this machine lacks; the description says what was used
    return TokenPrompts(seed)


def prepare_trace(
    path: str | None,
    *,
    start: int = 0,
    limit: int | None = None,
    speed: float = 1.0,
    length_scale: float = 1.0,
    max_model_len: int,
    seed: int = 0,
) -> Trace:
    """The trace of a file, or a generated one (S-S lengths of the paper, Poisson arrivals at 1/s), sliced and cut to the context.

    Raises:
        TraceError: see ``read_trace`` and ``slice_trace``.
    """
    trace = read_trace(path) if path is not None else generate_trace(start + (limit or 100), 1.0, seed=seed)
    chosen = slice_trace(trace, start=start, limit=limit, speed=speed)
    return fit_lengths(scale_lengths(chosen, length_scale), max_model_len)


def replay(
    config: LlumnixConfig,
    trace: Annotated[
        str | None, typer.Option(help="CSV of arrival time, prompt tokens, output tokens; else generated.")
    ] = None,
    speed: Annotated[float, typer.Option(help="Arrivals come so many times as fast as in the trace.")] = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of requests.")] = None,
    start: Annotated[int, typer.Option(min=0, help="Requests of the trace to skip.")] = 0,
    length_scale: Annotated[
        float, typer.Option(help="Prompts and outputs so many times as long as in the trace.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, sampling and a generated trace.")] = 0,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.0,
    url: Annotated[str | None, typer.Option(help="Server to load; by default the one of the configuration.")] = None,
    out: Annotated[str | None, typer.Option(help="Root of the run folders (default: runs).")] = None,
) -> int:
    """Send a trace's requests to a running server at their times; report TTFT, TPOT, end-to-end, preemptions, migrations.

    Exit code 1 when every request failed.
    """
    from apps.llumnix.report import print_summaries, write_report
    from apps.program.run_folder import new_run_folder

    address = url or config.url
    _, max_model_len = context_of(address)
    prepared = prepare_trace(
        trace, start=start, limit=limit, speed=speed, length_scale=length_scale, max_model_len=max_model_len, seed=seed
    )
    load = Load(choose_prompts(config.engine.model, seed), seed, temperature)
    print(f"{len(prepared)} requests over {prepared.duration_s:.0f} s to {address}: {prepared.origin};")
    print(f"prompts: {load.prompts.description}, seed {seed}", flush=True)
    folder = new_run_folder("llumnix", out, config)
    with ReplayProgress("replay", prepared) as progress:
        result = run_replay(address, prepared, load, progress=progress)
    page = write_report(folder, [result], title="Llumnix: replay")
    print_summaries([result])
    print(f"Report: {page}")
    for sample in result.error_samples:
        print(f"failed: {sample}")
    return int(result.summary().errors == len(result.records))


class ReplayProgress:
    """A line that shows a replay under way; a ``Progress``. On a terminal it moves, in a file it appears every ten seconds."""

    def __init__(self, label: str, trace: Trace):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self._label, self._total = label, len(trace)
        self._live = Console().is_terminal
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}"), transient=True, disable=not self._live,
        )  # fmt: skip
        self._task = self._bar.add_task(label, total=self._total, detail="")
        self._told = time.monotonic()

    def __enter__(self) -> ReplayProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, sent: int, ended: int, failed: int, tokens: int) -> None:
        detail = f"{sent - ended} under way, {tokens:,} events" + (f", {failed} failed" if failed else "")
        if self._live:
            self._bar.update(self._task, completed=ended, detail=detail)
        elif time.monotonic() - self._told >= 10.0:
            self._told = time.monotonic()
            print(f"  {self._label}: {ended} of {self._total} requests answered, {detail}", flush=True)
