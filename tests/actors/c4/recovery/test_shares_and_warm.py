"""Batch shares out of the master's verdicts, what a warm process imports, and what is said of a restart."""

from __future__ import annotations

import json as a_module
from types import SimpleNamespace
from typing import Any

import pytest

from actors.c4.diagnosis.verdict import Culprit, FaultKind, Verdict
from actors.c4.recovery import warm
from actors.c4.recovery.outcome import Event, Phase, restarts_of
from actors.c4.recovery.shares import batch_share, slow_ranks


def entry(number: int, action: str, ranks: tuple[int, ...], slowdown: float, repeats: int = 0) -> Any:
    verdict = Verdict(FaultKind.WORK_SLOW, Culprit(ranks=ranks), (), 1.0, 0.0, 1.0, slowdown=slowdown)
    return SimpleNamespace(number=number, repeats=repeats, action=action, verdict=verdict)


def test_a_slow_rank_stays_slow_until_its_fault_is_cleared_or_decided_anew() -> None:
    history = [entry(1, "rebalance", (2,), 3.0), entry(2, "ignore", (0,), 9.0), entry(3, "rebalance", (1,), 2.0)]
    assert slow_ranks(history) == {2: 3.0, 1: 2.0}
    history.append(entry(4, "cleared", (2,), 3.0, repeats=1))
    assert slow_ranks(history) == {1: 2.0}
    assert slow_ranks([*history, entry(5, "evict", (1,), 2.0, repeats=3)]) == {}


def test_outside_a_trainer_the_share_is_one() -> None:
    assert batch_share() == 1.0


def test_a_warm_process_imports_what_the_loop_names() -> None:
    captured = Verdict

    def loop() -> str:
        def inner() -> Any:
            return pytest.importorskip

        return a_module.dumps([str(captured), str(inner)])

    names = warm.modules_of(loop)
    assert {"json", "pytest", "actors.c4.diagnosis.verdict", __name__} <= set(names)
    value = warm.preload_value(loop, ["collections"]).split(",")
    assert value[0] == "torch"
    assert value[-1] == "collections"
    assert len(value) == len(set(value))


def test_a_module_that_cannot_be_imported_stops_nothing(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv(warm.PRELOAD_VARIABLE, "json,there_is_no_such_module")
    warm.preload()
    assert "there_is_no_such_module" in caplog.text


def test_a_restarts_phases_count_from_the_moment_the_failure_was_seen() -> None:
    events = [
        Event(1.0, 1, Phase.FIRST_REPORT),
        Event(10.0, 1, Phase.FAILURE_SEEN, "death: rank 3: the process is gone"),
        Event(10.2, 1, Phase.FENCED),
        Event(10.5, 2, Phase.WORKERS_PLACED),
        Event(12.0, 2, Phase.FIRST_REPORT),
        Event(20.0, 2, Phase.ENDED, "finished"),
    ]
    [restart] = restarts_of(events, {2: {"excluded": ("n3",), "resumed_from": "v"}})
    assert (restart.generation, restart.cause, restart.detail) == (2, "death", "rank 3: the process is gone")
    assert dict(restart.phases_s) == pytest.approx({"fenced": 0.2, "workers_placed": 0.5, "first_report": 2.0})
    assert (restart.excluded, restart.resumed_from) == (("n3",), "v")
