"""What `watch` shows of a status, and what `inject` says to a user's mistake. No Ray."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from rich.console import Console

from actors.c4.diagnosis.verdict import Culprit, FaultKind, Verdict
from actors.c4.injection.faults import Fault, FaultName
from actors.c4.ports import DelayMatrix, MasterStatus, NodeStatus, NumberedVerdict, OpenOperation, RankStatus, Wait
from apps.c4.inject import chosen, fault_rows
from apps.c4.watch import render
from apps.program.errors import UserError


def text(status: MasterStatus, now: float = 100.0) -> str:
    console = Console(file=io.StringIO(), width=180)
    console.print(render(status, now))
    return console.file.getvalue()  # type: ignore[attr-defined]


def rank(number: int, node: str, **changes) -> RankStatus:
    values = {
        "rank": number, "node_id": node, "node_name": f"host-{node}", "pid": 100 + number, "process": "sleeping",
        "heartbeat_age_s": 0.02, "report_age_s": 0.1, "entered": 50, "completed": 50, "open": None, "cpu_share": 0.9,
    }  # fmt: skip
    return RankStatus(**values | changes)


VERDICT = NumberedVerdict(
    3, 1, Verdict(FaultKind.PROCESS_STOPPED, Culprit((1,), None, ("host-b",)), ("It is in state T.",), 0.99, 9.0, 10.25),
    "evict", "the job stands still", 95.0, nodes=("b",),
)  # fmt: skip


def test_everything_of_a_hanging_job_is_there() -> None:
    matrix = np.array([[math.nan, 0.5], [9.0, math.nan]])
    status = MasterStatus(
        run="digits", generation=1, world_size=2, running_s=42, state="condemned",
        ranks=(rank(0, "a", open=OpenOperation("0", "all_reduce", 51, 3.5)), rank(1, "b", process="stopped", heartbeat_age_s=4)),
        nodes=(NodeStatus("a", "host-a", 0.1, 0, 0, 4.0, 300.0, ""), NodeStatus("b", "host-b", 0.2, 1, 0, 4.0, 300.0, "why")),
        verdicts=(VERDICT,), quarantine={"b": "process_stopped of rank 1"}, delays=(DelayMatrix("0", (0, 1), matrix),),
        waiting=(Wait(0, 1, "0", 51, 3.5),), operation_s=0.025, bytes_per_s=600.0,
    )  # fmt: skip
    shown = text(status)
    for part in (
        "digits: generation 1, 2 ranks, its workers are being ended", "25.0 ms", "stopped", "all_reduce #51 of group 0, 3.5 s",
        "rank 1 is waited for by 0", "9.00", "0.50", "non_communication_hang (process_stopped)", "rank 1", "host-b", "1.25",
        "evict: the job stands still", "It is in state T.", "process_stopped of rank 1", "2 agents (1 restarts)", "300 B/s a",
    ):  # fmt: skip
        assert part in shown, part


def test_a_run_without_workers_says_so() -> None:
    assert "no worker has started yet" in text(MasterStatus("digits", 0, 0, 0.0, "none"))


def test_a_large_job_fits_the_screen() -> None:
    ranks = tuple(rank(number, f"n{number // 8}") for number in range(1000))
    delays = (DelayMatrix("0", tuple(range(64)), np.full((64, 64), math.nan)),)
    shown = text(MasterStatus("big", 1, 1000, 1.0, "watching", ranks=ranks, delays=delays))
    assert "the first 64 of 1000" in shown
    assert len(shown.splitlines()) < 110


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"fault": None}, "--fault with one of sigstop"),
        ({"fault": "fire"}, "There is no fault 'fire'"),
        ({"rank": None}, "--rank"),
        ({"fault": "pause"}, "needs a duration"),
        ({"factor": 0.5}, "at least 1"),
    ],
)
def test_a_mistake_is_a_sentence(options: dict, sentence: str) -> None:
    values = {
        "fault": "slow_link",
        "rank": 2,
        "peer": None,
        "factor": 5.0,
        "rate": None,
        "duration": None,
        "limit": 65536,
    }
    with pytest.raises(UserError, match=sentence):
        chosen(**values | options)


def test_the_options_make_the_fault() -> None:
    assert chosen("slow_link", 2, None, 5.0, None, 10.0, 65536) == Fault(
        FaultName.SLOW_LINK, 2, factor=5.0, duration_s=10.0
    )


def test_all_faults_are_listed() -> None:
    assert [row[0] for row in fault_rows()] == [name.value for name in FaultName]
