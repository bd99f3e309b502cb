"""An agent's round: when it reports, what it obeys, and what it does after the master or itself was restarted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.c4 import processes
from actors.c4.generation import Worker
from actors.c4.monitors.agent_core import AgentCore
from actors.c4.monitors.settings import MonitorSettings
from actors.c4.monitors.wire import Unpacker
from actors.c4.ports import Fence, Orders, Report, Stack
from actors.c4.recorder.layout import Communicator
from actors.c4.recorder.ring import RingWriter, new_ring

SETTINGS = MonitorSettings(report_s=3600.0, idle_report_s=3600.0, suspicious_s=600.0)
"""Nothing is due by the clock: what is reported has a reason."""
ME = Worker(0, "n0", "host", os.getpid())


@pytest.fixture
def ring(tmp_path: Path) -> RingWriter:
    return new_ring(tmp_path, "run", 1, 0, 4)


@pytest.fixture
def agent(tmp_path: Path, ring: RingWriter) -> AgentCore:
    return AgentCore("run", "n0", tmp_path, SETTINGS)


def round_with(agent: AgentCore, orders: Orders) -> Report:
    report = agent.look()
    assert report is not None
    agent.follow(report, orders)
    return report


def watching(**changes) -> Orders:
    return Orders(1, (ME,), **changes)


def test_it_asks_at_once_and_reports_in_full_when_it_is_told_whom_to_watch(agent: AgentCore, ring: RingWriter) -> None:
    assert round_with(agent, watching()).packed == b""
    report = round_with(agent, watching())
    seen = Unpacker().unpack(report.packed)
    assert seen.ranks.rank.tolist() == [0]
    facts = processes.look(os.getpid())
    assert facts is not None
    assert report.started == ((os.getpid(), facts.started_ticks),)
    assert agent.look() is None, "nothing is new"


def test_an_operation_that_stands_still_is_reported_at_every_round(tmp_path: Path, ring: RingWriter) -> None:
    agent = AgentCore("run", "n0", tmp_path, MonitorSettings(report_s=0.05, poll_s=0.01, suspicious_s=0.1))
    group = ring.add_communicator(Communicator("0", "dp", (0, 1)))
    ring.enter(group, 1, 1, 1, 64)
    unpacker = Unpacker()
    round_with(agent, watching())
    unpacker.unpack(round_with(agent, watching()).packed)
    time.sleep(0.15)
    ages = [float(unpacker.unpack(round_with(agent, watching()).packed).progress.open_age_s[0]) for _ in range(3)]
    assert 0.15 <= ages[0] < ages[1] < ages[2]


def test_a_master_that_did_not_answer_gets_everything_again(agent: AgentCore, ring: RingWriter) -> None:
    group = ring.add_communicator(Communicator("0", "dp", (0, 1)))
    for sequence in range(1, 9):
        ring.end(ring.enter(group, sequence, 1, 1, 64))
    round_with(agent, watching())
    assert Unpacker().unpack(round_with(agent, watching()).packed).blocks.block.tolist() == [0, 1]
    agent.unanswered()
    again = Unpacker().unpack(round_with(agent, watching()).packed)
    assert again.blocks.block.tolist() == [0, 1]


def test_an_agent_that_was_restarted_tells_the_same(agent: AgentCore, ring: RingWriter, tmp_path: Path) -> None:
    group = ring.add_communicator(Communicator("0", "dp", (0, 1)))
    for sequence in range(1, 9):
        ring.end(ring.enter(group, sequence, 1, 1, 64))
    op_id = ring.enter(group, 9, 1, 1, 64)
    assert op_id
    round_with(agent, watching())
    first = Unpacker().unpack(round_with(agent, watching()).packed)
    second = AgentCore("run", "n0", tmp_path, SETTINGS)
    round_with(second, watching())
    after = Unpacker().unpack(round_with(second, watching()).packed)
    assert after.blocks.block.tolist() == first.blocks.block.tolist()
    assert after.progress.entered.tolist() == first.progress.entered.tolist() == [9]
    assert after.progress.completed.tolist() == [8]


@pytest.fixture
def victim():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    while processes.look(process.pid) is None:
        time.sleep(0.01)
    yield process
    process.kill()
    process.wait()


def test_it_kills_exactly_the_process_that_it_is_told_to_and_says_so(
    agent: AgentCore, victim: subprocess.Popen
) -> None:
    facts = processes.look(victim.pid)
    assert facts is not None
    fence = Fence(0, victim.pid, facts.started_ticks)
    round_with(agent, watching(kill=(fence,)))
    assert victim.wait(10) == -9
    assert round_with(agent, watching()).gone == (fence,)
    assert agent.look() is None, "the master knows it now"


def test_it_leaves_a_later_process_under_the_number_alone(agent: AgentCore, victim: subprocess.Popen) -> None:
    facts = processes.look(victim.pid)
    assert facts is not None
    fence = Fence(0, victim.pid, facts.started_ticks - 1)
    round_with(agent, watching(kill=(fence,)))
    assert round_with(agent, watching()).gone == (fence,)
    assert victim.poll() is None


def test_it_leaves_a_process_of_which_nobody_knows_the_start_alone(agent: AgentCore, victim: subprocess.Popen) -> None:
    fence = Fence(0, victim.pid, -1)
    round_with(agent, watching(kill=(fence,)))
    assert round_with(agent, watching()).gone == (fence,)
    assert victim.poll() is None


def test_a_process_whose_stacks_are_wanted_is_killed_after_they_are_taken(
    tmp_path: Path, victim: subprocess.Popen
) -> None:
    facts = processes.look(victim.pid)
    assert facts is not None
    agent, fence = AgentCore("run", "n0", tmp_path, SETTINGS), Fence(1, victim.pid, facts.started_ticks)
    its = Worker(3, "n0", "host", victim.pid)
    round_with(agent, Orders(1, (its,)))
    round_with(agent, Orders(1, (its,), kill=(fence,), stacks=(3,)))
    assert agent.stacks_wanted == {3}
    assert victim.poll() is None
    agent.add_stack(Stack(3, victim.pid, "text"))
    agent.look()
    assert victim.wait(10) == -9


def test_stacks_go_with_the_next_report_once(agent: AgentCore) -> None:
    round_with(agent, watching())
    round_with(agent, watching(stacks=(0,)))
    assert agent.stacks_wanted == {0}
    agent.add_stack(Stack(0, os.getpid(), "text"))
    assert [stack.text for stack in round_with(agent, watching()).stacks] == ["text"]
    agent.unanswered()
    assert round_with(agent, watching()).stacks == ()


def test_on_leaving_it_removes_the_rings_of_the_dead_alone(agent: AgentCore, ring: RingWriter, tmp_path: Path) -> None:
    dead = tmp_path / "run.g1.r1.p4194303.ring"
    dead.write_bytes(b"")
    other = tmp_path / "another.g1.r1.p4194303.ring"
    other.write_bytes(b"")
    agent.close(remove_rings=True)
    assert not dead.exists()
    assert other.exists()
    assert ring.path is not None
    assert ring.path.exists()
