"""The HTTP client, the terminal chat and the status table against a real HTTP server over instances in one process."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from dataclasses import dataclass

import pytest
import uvicorn
from rich.console import Console

from actors.llumnix.frontend import Frontend, FrontendSettings
from apps.llumnix.chat import ChatSession, chat_loop
from apps.llumnix.client import Client, ServerError
from apps.llumnix.http_app import HttpLimits, build_app
from apps.llumnix.service import check_port
from apps.llumnix.status import render
from apps.program.errors import UserError
from tests.actors.llumnix.fake_cluster import FakeInstance, FakeScheduler, expected_text
from tests.apps.llumnix.test_http_api import MODEL, FakeBackend


@dataclass
class Server:
    url: str
    port: int
    scheduler: FakeScheduler
    frontend: Frontend

    def answer(self, request_id: str) -> str:
        """The undisturbed answer to a request that reached an instance."""
        added = [r for i in self.scheduler.instances.values() for r in i.added if r.request_id == f"{request_id}-0"]
        return expected_text(added[0])


@pytest.fixture
def server():
    parts: dict = {}
    ready, end = threading.Event(), threading.Event()

    async def main():
        scheduler = FakeScheduler(FakeInstance("i0", 0.004), FakeInstance("i1", 0.004))
        frontend = Frontend(scheduler, lambda handle: handle, FrontendSettings(sweep_interval_s=0.05))
        frontend.start()
        app = build_app(FakeBackend(frontend, scheduler), HttpLimits())
        http = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        task = asyncio.create_task(http.serve())
        while not http.started:
            await asyncio.sleep(0.01)
        port = http.servers[0].sockets[0].getsockname()[1]
        parts["server"] = Server(f"http://127.0.0.1:{port}", port, scheduler, frontend)
        ready.set()
        await asyncio.to_thread(end.wait)
        http.should_exit = True
        await frontend.stop()
        for instance in scheduler.instances.values():
            instance.die()
        await task

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(10)
    yield parts["server"]
    end.set()
    thread.join(20)
    assert not thread.is_alive()


def until(condition, timeout=5.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def test_a_stream_migrated_while_it_is_read_equals_the_undisturbed_answer(server):
    with Client(server.url) as client:
        text, moves = "", 0
        for event in client.stream("completions", model=client.model(), prompt="tell me", max_tokens=120, seed=3):
            text += event["choices"][0]["text"]
            if len(text) % 20 == 10:
                moves += client.migrate(event["id"] + "-0")["outcome"] == "committed"
        assert moves >= 3 and text == server.answer(event["id"])


def test_closing_a_stream_early_aborts_the_request_at_every_instance(server):
    with Client(server.url) as client:
        events = client.stream("completions", model=MODEL, prompt="x", max_tokens=500)
        next(events)
        events.close()
        until(lambda: not any(i.requests for i in server.scheduler.instances.values()))
        until(lambda: server.frontend.num_streams == 0)
        assert server.scheduler.aborted


def test_a_refusal_is_told_in_the_servers_words(server):
    with Client(server.url) as client:
        with pytest.raises(ServerError, match="The model 'gpt-9' does not exist") as raised:
            client.complete("completions", model="gpt-9", prompt="x")
        assert raised.value.status == 404
        with pytest.raises(ServerError, match="at least one token"):
            list(client.stream("completions", model=MODEL, prompt=""))
        with pytest.raises(ServerError, match="at no instance"):
            client.migrate("nobody")


def test_a_server_that_is_not_there_is_told_with_what_to_do():
    with Client("http://127.0.0.1:9") as client, pytest.raises(ServerError, match="cannot be reached.*serve"):
        client.status()


def test_chat_streams_keeps_history_and_obeys_commands(server):
    lines = iter(["hello", "", "again", "/undo", "/undo", "/undo", "/nonsense", "/quit"])
    out = io.StringIO()
    with Client(server.url) as client:
        session = ChatSession(client, max_tokens=6, seed=1)
        histories = []

        def read(prompt):
            histories.append([m["role"] for m in session.messages])
            return next(lines)

        chat_loop(session, read, out)
    exchange = ["user", "assistant"]
    assert histories == [[], exchange, exchange, exchange * 2, exchange, [], [], []]
    added = [r for i in server.scheduler.instances.values() for r in i.added]
    prompts = sorted((bytes(r.prompt_token_ids).decode() for r in added), key=len)
    first = expected_text(min(added, key=lambda r: len(r.prompt_token_ids)))
    assert prompts == ["user:hello\nassistant:", f"user:hello\nassistant:{first}\nuser:again\nassistant:"]
    assert f"bot> {first}\n" in out.getvalue() and "nothing to take back" in out.getvalue()


def test_chat_survives_a_refusal_and_ends_at_end_of_input(server):
    lines = iter(["x" * 600, "ok"])
    out = io.StringIO()

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    with Client(server.url) as client:
        chat_loop(ChatSession(client, max_tokens=4, seed=1), read, out)
    assert "maximum context length" in out.getvalue() and out.getvalue().count("bot> ") == 2


def test_the_status_table_shows_instances_requests_and_migrations():
    status = {
        "model": {"name": "m"},
        "policy": {"dispatch": "llumnix", "migration": True},
        "counts": {"dispatched": 7, "migrated": 2, "migration_failures": 1, "recovered": 0},
        "instances": [
            {
                "instance_id": "instance-a", "used_blocks": 32, "total_blocks": 64, "running": 3, "waiting": 1,
                "freeness": None, "step_ms": 12.34, "preemptions": 5, "draining": True,
            }
        ],
        "requests": [
            {
                "request_id": f"cmpl-{n}", "instance_id": "instance-a", "arrival_time": 90.0 + n, "prompt_tokens": 11,
                "priority": 0, "migrations": n,
            }
            for n in range(20)
        ],
        "migrations": [
            {
                "request_id": "cmpl-1", "source": "instance-a", "destination": "instance-b", "ended_at": 99.0,
                "outcome": "committed", "committed": True,
                "report": {"downtime_ms": 1.25, "stages": 2, "bytes": 2_500_000},
            },
            {
                "request_id": None, "source": "instance-a", "destination": "instance-b", "ended_at": 98.0,
                "outcome": "out of memory", "committed": False, "report": None,
            },
        ],
    }  # fmt: skip
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(status, now=100.0))
    text = console.export_text()
    for shown in ("instance-a (draining)", "32/64", "██████████░░░░░░░░░░", "12.3", "the oldest 15 of 20", "cmpl-14",
                  "1.25", "2.5", "out of memory", "7 dispatched", "2 migrated", "-inf"):  # fmt: skip
        assert shown in text, shown
    assert "cmpl-19" not in text


def test_a_port_in_use_is_told_before_anything_starts(server):
    with pytest.raises(UserError, match=f"127.0.0.1:{server.port} .*server.port=N"):
        check_port("127.0.0.1", server.port)
    check_port("127.0.0.1", 0)
