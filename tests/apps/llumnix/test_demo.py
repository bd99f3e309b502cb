"""The demo's parts without a cluster: which trace it takes, what the moving chat shows, and that a difference is a failure."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from apps.llumnix import demo as subject
from apps.llumnix.client import ServerError
from apps.llumnix.demo import DemoConfig, DemoFailed, DemoSettings, migrating_chat, whole_trace
from apps.program.config import load_config

WORDS = [f"word{i} " for i in range(60)]


class FakeClient:
    """Streams ``WORDS``; the text of the first answer may differ from the second's."""

    def __init__(self, answers: list[list[str]], refuse: int = 0):
        self.url = "http://fake"
        self.answers, self.refuse = answers, refuse
        self.migration = True
        self.orders: list[str] = []
        self.place = "replica-a"
        self.bodies: list[dict[str, Any]] = []

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def model(self) -> str:
        return "fake"

    def status(self) -> dict[str, Any]:
        return {
            "policy": {"migration": self.migration},
            "requests": [{"request_id": "chatcmpl-1-0", "instance_id": self.place}],
        }

    def set_policy(self, dispatch: str | None = None, migration: bool | None = None) -> dict[str, Any]:
        self.migration = bool(migration)
        return {}

    def stream(self, path: str, **body: Any) -> Iterator[dict[str, Any]]:
        assert not self.migration  # only our own moves
        self.bodies.append(body)
        yield {"id": "chatcmpl-1", "choices": [{"delta": {"role": "assistant", "content": ""}}]}
        for word in self.answers.pop(0):
            time.sleep(0.002)
            yield {"id": "chatcmpl-1", "choices": [{"delta": {"content": word}}]}

    def migrate(self, request_id: str, destination: str | None = None) -> dict[str, Any]:
        self.orders.append(request_id)
        if len(self.orders) <= self.refuse:
            raise ServerError("no room", 404)
        source, self.place = self.place, "replica-b" if self.place == "replica-a" else "replica-a"
        return {"source": source, "destination": self.place, "committed": True, "report": {"downtime_ms": 1.5}}


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=100)


def chat(monkeypatch: pytest.MonkeyPatch, console: Console, client: FakeClient) -> dict[str, Any]:
    monkeypatch.setattr(subject, "Client", lambda url: client)
    settings = DemoSettings(answer_tokens=60, hops=3)
    return migrating_chat(console, client, settings, ["replica-a", "replica-b"])  # type: ignore[arg-type]


def test_the_answer_hops_and_is_compared(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    client = FakeClient([WORDS, WORDS])
    told = chat(monkeypatch, console, client)
    assert told["equal"] is True
    assert told["text"] == "".join(WORDS)
    assert [move["destination"] for move in told["moves"]] == ["replica-b", "replica-a", "replica-b"]
    assert set(client.orders) == {"chatcmpl-1"}
    assert client.bodies[0] == client.bodies[1]
    assert client.migration is True  # as before
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "⟨instance 1⟩" in shown
    assert "⟨instance 2, pause 1.5 ms⟩" in shown
    assert told["transcript"].count("⟨") == 4


def test_refused_moves_are_tried_again(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    told = chat(monkeypatch, console, FakeClient([WORDS * 4, WORDS * 4], refuse=1))
    assert told["refusals"] == ["no room"]
    assert len(told["moves"]) >= 2


def test_a_changed_answer_fails_the_demo(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    client = FakeClient([WORDS, [*WORDS[:-1], "other "]])
    with pytest.raises(DemoFailed, match="differs"):
        chat(monkeypatch, console, client)
    assert client.migration is True
    assert DemoFailed.exit_code != 0


def test_an_answer_that_never_moved_fails_the_demo(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    with pytest.raises(DemoFailed, match="Only 0 of 3 moves"):
        chat(monkeypatch, console, FakeClient([WORDS, WORDS], refuse=1000))


def test_missing_trace_is_generated_and_says_so() -> None:
    trace = whole_trace(DemoSettings(trace="does/not/exist.csv", start=10, max_requests=50))
    assert trace.origin.startswith("generated (M-M lengths")
    assert len(trace) >= 60


@pytest.mark.shared_data
def test_real_trace_is_found_beside_the_repository() -> None:
    if not (subject.REPOSITORY / DemoSettings().trace).is_file():
        pytest.skip("../shared/data/traces/azure_2023_conv.csv is not there")
    trace = whole_trace(DemoSettings())
    assert trace.origin.endswith("azure_2023_conv.csv")
    assert len(trace) > DemoSettings().start + DemoSettings().max_requests


def test_the_cpu_preset_is_a_demo_configuration() -> None:
    config = load_config(DemoConfig, "cpu", ["demo.hops=2", "engine.dtype=int8"], system="llumnix")
    assert config.demo.hops == 2
    assert config.engine.dtype == "int8"
    assert config.instances.count >= 2
