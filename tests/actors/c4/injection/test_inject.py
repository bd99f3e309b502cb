"""Faults from outside, on a process of this test's own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.c4.diagnosis.observation import ProcessState
from actors.c4.injection.faults import Fault, FaultName, InjectionError
from actors.c4.injection.inject import Target, inject, pacing_rate, successor
from actors.c4.processes import look, state_of
from actors.c4.recorder.files import side_file
from actors.c4.recorder.layout import Communicator
from actors.c4.recorder.links import FREE, STALLED, LinkControls
from actors.c4.recorder.ring import RingWriter, new_ring

WRITER = """
import sys, time
print("ready", flush=True)
while True:
    try:
        with open(sys.argv[1], "wb") as file:
            file.write(b"x" * 100_000)
        print("written", flush=True)
    except OSError as error:
        print(f"failed {error.errno}", flush=True)
    time.sleep(0.05)
"""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen]:
    made = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "file")], stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None
    assert made.stdout.readline().strip() == "ready"
    yield made
    made.kill()
    made.wait()
    made.stdout.close()


def target(process: subprocess.Popen, **changes) -> Target:
    facts = look(process.pid)
    assert facts is not None
    return Target(2, process.pid, facts.started_ticks, **changes)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sigstop_and_back(process: subprocess.Popen, tmp_path: Path) -> None:
    injected = inject(Fault(FaultName.SIGSTOP, 2), target(process), tmp_path)
    wait_for(lambda: state_of(process.pid, -1) is ProcessState.STOPPED)
    assert process.poll() is None
    injected.stop()
    wait_for(lambda: state_of(process.pid, -1) is not ProcessState.STOPPED)
    assert state_of(process.pid, -1) in (ProcessState.RUNNING, ProcessState.SLEEPING)


def test_sigkill_and_then_there_is_nothing_to_inject_into(process: subprocess.Popen, tmp_path: Path) -> None:
    victim = target(process)
    inject(Fault(FaultName.SIGKILL, 2), victim, tmp_path)
    assert process.wait(10) == -9
    with pytest.raises(InjectionError, match="has ended"):
        inject(Fault(FaultName.SIGSTOP, 2), victim, tmp_path)


def test_a_lost_node_takes_all_its_processes(process: subprocess.Popen, tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    facts = look(other.pid)
    assert facts is not None
    inject(Fault(FaultName.NODE_LOSS, 2), target(process, node_pids=((other.pid, facts.started_ticks),)), tmp_path)
    assert (process.wait(10), other.wait(10)) == (-9, -9)


def test_a_full_disk_fails_writes_until_it_is_taken_back(process: subprocess.Popen, tmp_path: Path) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "written"
    injected = inject(Fault(FaultName.DISK_FULL, 2, limit_bytes=50_000), target(process), tmp_path)
    wait_for(lambda: process.stdout.readline().startswith("failed"))  # type: ignore[union-attr]
    assert (tmp_path / "file").stat().st_size <= 50_000, "part of the file was written, as on a real disk"
    injected.stop()
    wait_for(lambda: process.stdout.readline().strip() == "written")  # type: ignore[union-attr]


@pytest.fixture
def ring(tmp_path: Path) -> RingWriter:
    made = new_ring(tmp_path, "run", 1, 2, 4)
    assert made.path is not None
    LinkControls.create(side_file(made.path, ".links"), 4).close()
    return made


def word(ring: RingWriter, destination: int) -> int:
    assert ring.path is not None
    links = LinkControls.open(side_file(ring.path, ".links"))
    try:
        return links.get(destination)
    finally:
        links.close()


def test_links_are_paced_stalled_and_freed(process: subprocess.Popen, ring: RingWriter, tmp_path: Path) -> None:
    victim = target(process, ring=ring.path)
    slow = inject(Fault(FaultName.SLOW_LINK, 2, peer=3, rate_bytes_per_s=1e6), victim, tmp_path)
    assert (word(ring, 3), word(ring, 1)) == (1_000_000, FREE)
    slow.stop()
    assert word(ring, 3) == FREE
    inject(Fault(FaultName.STALLED_LINK, 2, peer=3), victim, tmp_path)
    assert word(ring, 3) == STALLED
    with pytest.raises(InjectionError, match="no rank 9"):
        inject(Fault(FaultName.STALLED_LINK, 2, peer=9), victim, tmp_path)
    with pytest.raises(InjectionError, match="needs a peer"):
        inject(Fault(FaultName.STALLED_LINK, 2), victim, tmp_path)


def test_the_rate_of_a_slow_link_follows_from_the_jobs_traffic(process: subprocess.Popen, ring: RingWriter) -> None:
    """10 MB/s cross the link; at 10 MB/s it is busy as long as the job ran before: a step takes twice as long."""
    victim = target(process, ring=ring.path)
    with pytest.raises(InjectionError, match="in no group"):
        successor(victim)
    group = ring.add_communicator(Communicator("0", "dp", (0, 1, 2, 3)))
    with pytest.raises(InjectionError, match="received nothing"):
        pacing_rate(victim, 2.0)
    for number in range(1, 11):
        op_id = ring.enter(group, number, 1, 1, 10_000)
        ring.open_edges(op_id, number, group, 1, 2, 3)[1].moved(10_000, 1)
        ring.stamp(op_id, 1, 1)
        ring._ops[(op_id & 4095) * 8 + 3] = number * 10**6  # entered every millisecond
        ring.stamp(op_id, number * 10**6, number * 10**6 + 10**6)
    assert pacing_rate(victim, 2.0) == pytest.approx(1e7, rel=0.01)
    assert pacing_rate(victim, 5.0) == pytest.approx(2.5e6, rel=0.01)
    assert successor(victim) == 3
