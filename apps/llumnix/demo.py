"""``python -m apps.llumnix demo``: a model served by several instances, a sentence that moves between them while it is written,
and real arrivals replayed without and with migration. Everything through the real Serve graph, as a user's own program would.
"""

from __future__ import annotations

import dataclasses
import difflib
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

from rich.console import Console

from apps.llumnix.client import Client, ServerError
from apps.llumnix.config import LlumnixConfig
from apps.llumnix.history import short_names
from apps.llumnix.records import ReplayResult
from apps.llumnix.replay import Load, ReplayProgress, choose_prompts, context_of, run_replay
from apps.llumnix.trace import Trace, fit_lengths, generate_trace, read_trace, scale_lengths, slice_trace
from apps.program.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
STYLES = ("bold blue", "bold yellow", "bold magenta", "bold cyan", "bold green", "bold red")


@dataclass(frozen=True)
class DemoSettings:
    """What the demo shows; the sizes are for two cores, where queues and imbalance must appear within a minute."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    question: str = "Write a short story about a lighthouse keeper who finds a letter in a bottle."
    answer_tokens: int = 160
    hops: int = 4
    """Moves of the chat's request while it streams."""
    trace: str = "../shared/data/traces/azure_2023_conv.csv"
    """CSV of real arrivals, relative to the repository; where it is missing a trace is generated."""
    start: int = 2000
    """Requests of the trace to skip: what follows comes at a steady mean rate, with bursts."""
    seconds: float = 45.0
    """Length of the arrivals in each arm."""
    load: float = 1.0
    """Arrival rate as a share of what the instances were measured to serve; the trace's clock is set by it."""
    max_requests: int = 600
    length_scale: float = 0.25
    """Prompts and outputs are so many times as long as in the trace: its GPUs were faster than two cores."""
    kv_memory_mib: int = 64
    """KV memory of each instance; replaces engine.kv_memory_mib. Small, so that memory is what requests wait for."""
    max_batched_tokens: int = 96
    """Replaces engine.max_batched_tokens: short prefill chunks, because a moved request waits for the step under way."""
    seed: int = 7


class DemoConfig(LlumnixConfig):
    """The configuration of ``serve`` and the demo's own section."""

    demo: DemoSettings = DemoSettings()


class DemoFailed(UserError):
    """What the demo is there to show did not hold."""


def demo(config: DemoConfig) -> None:
    """Serve a model on several instances, move a streaming answer between them, replay real arrivals; write a report."""
    from apps.llumnix.report import print_summaries, write_report
    from apps.llumnix.service import running_service
    from apps.program.run_folder import new_run_folder

    began = time.monotonic()
    console = Console(highlight=False)
    settings = config.demo
    engine = dataclasses.replace(
        config.engine, kv_memory_mib=settings.kv_memory_mib, max_batched_tokens=settings.max_batched_tokens
    )
    config = config.model_copy(update={"engine": engine})
    if config.instances.count < 2:
        raise UserError("The demo moves a request between instances: it needs instances.count of at least 2.")
    folder = new_run_folder("llumnix", config=config)
    console.rule("[bold]1  Serve", align="left")
    service = ExitStack()
    with waiting(console, f"starting Ray and {config.instances.count} instances of {config.model_name}"):
        url = service.enter_context(running_service(config))
    try:
        with Client(url) as client:
            instances = wait_for_instances(client, config.instances.count)
            describe(console, config, client)
            console.rule("[bold]2  A sentence that moves while it is written", align="left")
            talk = migrating_chat(console, client, settings, instances)
            console.rule("[bold]3  Real arrivals, without and with migration", align="left")
            trace = demo_trace(console, config, url)
            results = replay_arms(console, client, config, trace, url)
            audit = client.audit()
    finally:
        with waiting(console, "ending the instances"):
            service.close()
    extra = {"chat": talk, "audit": audit, "model": config.engine.model, "dtype": config.engine.dtype}
    title = "Llumnix: requests that move while they are served"
    page = write_report(folder, results, title=title, transcript=talk["transcript"], extra=extra)
    print_summaries(results)
    console.print(f"Report: {page}   ({time.monotonic() - began:.0f} s in all)", soft_wrap=True)
    failures = sum(result.summary().errors for result in results)
    if failures:
        raise DemoFailed(f"{failures} requests of the replays failed; {page} names the reasons.")


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """Shows that something takes its time, and in the end how long it took."""
    began = time.monotonic()
    if console.is_terminal:
        with console.status(f"{what} ..."):
            yield
    else:
        console.print(f"{what} ...")
        yield
    console.print(f"{what}: {time.monotonic() - began:.1f} s")


def wait_for_instances(client: Client, count: int, timeout_s: float = 60.0) -> list[str]:
    """Ids of all instances, sorted, when all have registered."""
    deadline = time.monotonic() + timeout_s
    while True:
        names = sorted(instance["instance_id"] for instance in client.status()["instances"])
        if len(names) >= count:
            return names
        if time.monotonic() > deadline:
            raise UserError(f"Only {len(names)} of {count} instances registered within {timeout_s:g} s.")
        time.sleep(0.2)


def describe(console: Console, config: LlumnixConfig, client: Client) -> None:
    """What runs."""
    first = client.status()["instances"][0]
    tokens = first["total_blocks"] * config.engine.block_size
    console.print(
        f"{config.instances.count} instances of {config.model_name} ({config.engine.dtype}, {config.engine.threads} thread each, "
        f"KV memory for {tokens:,} tokens each) answer at {client.url}/v1; numerics {first['numerics']}."
    )


# ---- the chat


def migrating_chat(console: Console, client: Client, settings: DemoSettings, instances: list[str]) -> dict[str, Any]:
    """Streams an answer while its request hops, then asks again without hops and compares; raises DemoFailed on a difference."""
    before = client.status()["policy"]["migration"]
    client.set_policy(migration=False)  # only our own moves
    try:
        console.print(f"[bold]you>[/] {settings.question}")
        mover = _Mover(client, settings, instances)
        text, where = mover.stream(console)
        plain = "".join(_deltas(client, settings))
    finally:
        client.set_policy(migration=before)
    if len(mover.moves) < min(settings.hops, 2):
        raise DemoFailed(f"Only {len(mover.moves)} of {settings.hops} moves were made: {'; '.join(mover.refusals)}.")
    if text != plain:
        difference = "\n".join(difflib.ndiff([plain], [text]))
        raise DemoFailed(f"The migrated answer differs from the unmigrated one:\n{difference}")
    pauses = [move["downtime_ms"] for move in mover.moves]
    told = ", ".join(f"{pause:.2f}" for pause in pauses)
    console.print(f"Pauses of the {len(pauses)} moves: {told} ms. Journey: {' → '.join(where)}.")
    console.print("Asked again with the same seed and never moved: [bold green]the text is the same, byte for byte.[/]")
    transcript = (
        f"you> {settings.question}\nbot> {mover.marked}\n\nThe same question, never moved:\nbot> {plain}\n\nEqual: yes"
    )
    return {"moves": mover.moves, "refusals": mover.refusals, "text": text, "equal": True, "transcript": transcript}


def _deltas(client: Client, settings: DemoSettings, told_id: Any = None) -> Iterator[str]:
    """The answer's text as it streams; ``told_id`` is called with the response's id at the first event."""
    body = {
        "model": client.model(),
        "messages": [{"role": "user", "content": settings.question}],
        "max_tokens": settings.answer_tokens,
        "temperature": 0.7,
        "seed": settings.seed,
    }
    for event in client.stream("chat/completions", **body):
        if told_id is not None:
            told_id(event["id"])
            told_id = None
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                yield text


class _Mover:
    """Prints a streaming answer in the colour of the instance that writes it, while a thread orders the moves."""

    def __init__(self, client: Client, settings: DemoSettings, instances: list[str]):
        self._client, self._settings = client, settings
        self._names = short_names(instances)
        self._styles = {name: STYLES[index % len(STYLES)] for index, name in enumerate(instances)}
        self._events: SimpleQueue[tuple[str, float]] = SimpleQueue()
        self._received = 0
        self._ended = threading.Event()
        self.moves: list[dict[str, Any]] = []
        self.refusals: list[str] = []
        self.marked = ""

    def stream(self, console: Console) -> tuple[str, list[str]]:
        """Returns the whole text and the names of the instances visited, in order."""
        text, style, where = "", "", []
        thread: threading.Thread | None = None
        request_id = ""

        def begin(response_id: str) -> None:
            nonlocal request_id
            request_id = response_id

        console.print("[bold]bot>[/] ", end="")
        try:
            for delta in _deltas(self._client, self._settings, begin):
                if thread is None:
                    place = self._place_of(request_id)
                    where.append(self._names.get(place, place))
                    style = self._styles.get(place, "")
                    console.print(f"⟨{where[-1]}⟩ ", style=style, end="")
                    self.marked += f"⟨{where[-1]}⟩ "
                    thread = threading.Thread(target=self._move, args=(request_id,), daemon=True)
                    thread.start()
                try:
                    place, pause_ms = self._events.get_nowait()
                except Empty:
                    pass
                else:
                    where.append(self._names.get(place, place))
                    style = self._styles.get(place, "")
                    console.print(f"⟨{where[-1]}, pause {pause_ms:.1f} ms⟩ ", style=f"{style} reverse", end="")
                    self.marked += f"⟨{where[-1]}⟩ "
                text, self._received = text + delta, self._received + 1
                self.marked += delta
                console.print(delta, style=style.removeprefix("bold "), end="", markup=False)
        finally:
            self._ended.set()
            if thread is not None:
                thread.join(60.0)
            console.print()
        return text, where

    def _place_of(self, request_id: str) -> str:
        for request in self._client.status()["requests"]:
            if request["request_id"].startswith(request_id):
                return request["instance_id"]
        return "?"

    def _move(self, request_id: str) -> None:
        """A move each time a further share of the answer has come; a refusal is noted, not fatal. Shares leave a margin: the
        model may end its answer before ``answer_tokens``."""
        share = 0.7 * self._settings.answer_tokens / (self._settings.hops + 1)
        with Client(self._client.url) as client:
            while len(self.moves) < self._settings.hops and not self._ended.is_set():
                if self._received < share * (len(self.moves) + 1):
                    self._ended.wait(0.005)
                    continue
                try:
                    record = client.migrate(request_id)
                except ServerError as error:
                    self.refusals.append(str(error))
                    self._ended.wait(0.1)
                    continue
                if not record["committed"]:
                    self.refusals.append(str(record["outcome"]))
                    continue
                report = record.get("report") or {}
                pause_ms = float(report.get("downtime_ms") or 0.0)
                self.moves.append(
                    {"source": record["source"], "destination": record["destination"], "downtime_ms": pause_ms}
                )
                self._events.put((record["destination"], pause_ms))


# ---- the replay


CALIBRATION_REQUESTS = 32


def demo_trace(console: Console, config: DemoConfig, url: str) -> Trace:
    """Arrivals for ``demo.seconds`` at the rate ``demo.load`` asks for: of the real trace when the file is there, else with the
    paper's length distributions."""
    settings = config.demo
    whole = whole_trace(settings)
    sample = slice_trace(whole, start=settings.start, limit=CALIBRATION_REQUESTS, speed=1.0)
    max_model_len = context_of(url)[1]
    burst = Trace(tuple(dataclasses.replace(one, arrival_s=0.0) for one in sample), sample.origin)
    burst = fit_lengths(scale_lengths(burst, settings.length_scale), max_model_len)
    with waiting(console, f"measuring what this machine serves, with {len(burst)} requests at once"):
        load = Load(choose_prompts(config.engine.model, settings.seed + 100), settings.seed, temperature=0.7)
        result = run_replay(url, burst, load, name="calibration")
    if result.summary().errors:
        raise DemoFailed(f"Requests failed: {'; '.join(result.error_samples)}")
    capacity = len(burst) / result.duration_s
    rate = settings.load * capacity
    count = max(20, min(settings.max_requests, round(rate * settings.seconds)))
    chosen = slice_trace(whole, start=settings.start, limit=count, speed=1.0)
    chosen = slice_trace(chosen, speed=rate / chosen.rate_per_s)
    console.print(f"It serves {capacity:.2f} such requests/s; arrivals come at {settings.load:.0%} of that.")
    return fit_lengths(scale_lengths(chosen, settings.length_scale), max_model_len)


def whole_trace(settings: DemoSettings) -> Trace:
    """The real trace, or a generated one of which any slice can be taken."""
    file = Path(settings.trace).expanduser()
    file = file if file.is_absolute() else REPOSITORY / file
    if file.is_file():
        return read_trace(file)
    count = settings.start + max(settings.max_requests, CALIBRATION_REQUESTS)
    return generate_trace(count, 1.0, prompts="M", outputs="M", cv=1.5, cap=2048, seed=settings.seed)


def replay_arms(console: Console, client: Client, config: DemoConfig, trace: Trace, url: str) -> list[ReplayResult]:
    """The same arrivals without and with migration; prompts differ, so that no arm finds the other's blocks in the cache."""
    settings = config.demo
    real = not trace.origin.startswith("generated")
    prompt = sum(one.prompt_tokens for one in trace) / len(trace)
    output = sum(one.output_tokens for one in trace) / len(trace)
    console.print(
        f"{len(trace)} requests in {trace.duration_s:.0f} s "
        + (
            f"from the real trace {Path(trace.origin).name}"
            if real
            else f"({trace.origin}; the real trace is not here)"
        )
        + f", lengths x {settings.length_scale:g}: {prompt:.0f} prompt and {output:.0f} output tokens on average."
    )
    results = []
    for number, (name, migration) in enumerate((("without migration", False), ("with migration", True))):
        client.set_policy(migration=migration)
        load = Load(choose_prompts(config.engine.model, settings.seed + number), settings.seed, temperature=0.7)
        with ReplayProgress(name, trace) as progress:
            result = run_replay(url, trace, load, name=name, progress=progress)
        results.append(result)
        told = result.summary()
        console.print(
            f"{name}: {told.duration_s:.0f} s, TTFT P99 {told.ttft_s.p99:.2f} s, {told.preemptions} preemptions, "
            f"{told.migrations} migrations, {told.errors} errors"
        )
    return results
