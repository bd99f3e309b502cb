"""Rings and processes -> observation: real rings written by this process, and real processes in every state."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actors.c4 import processes
from actors.c4.diagnosis.observation import ProcessState
from actors.c4.generation import Worker
from actors.c4.monitors.node_reader import NodeReader
from actors.c4.recorder.layout import Communicator
from actors.c4.recorder.records import ElementType, OpFlag, OpType
from actors.c4.recorder.ring import RingWriter, new_ring

RANKS = (0, 1, 2, 3)


@pytest.fixture
def ring(tmp_path: Path) -> RingWriter:
    return new_ring(tmp_path, "run", 1, 0, 4)


@pytest.fixture
def reader(tmp_path: Path, ring: RingWriter) -> NodeReader:
    made = NodeReader("n0", tmp_path, "run")
    made.watch(1, [Worker(0, "n0", "host", os.getpid())])
    return made


def reduce(ring: RingWriter, group: int, sequence: int, end: bool = True, flags: int = 0) -> int:
    op_id = ring.enter(group, sequence, OpType.ALL_REDUCE, ElementType.FLOAT32, 4096)
    if end:
        ring.end(op_id, flags)
    return op_id


def test_before_the_first_record_a_worker_is_a_row_without_heartbeat(tmp_path: Path) -> None:
    reader = NodeReader("n0", tmp_path, "run")
    assert reader.read() is None
    reader.watch(1, [Worker(0, "n0", "host", os.getpid())])
    seen = reader.read()
    assert seen is not None
    assert seen.ranks.rank.tolist() == [0]
    assert np.isnan(seen.ranks.heartbeat_age_s[0])
    assert len(seen.progress.rank) == 0


def test_progress_of_a_rank_between_operations(ring: RingWriter, reader: NodeReader) -> None:
    group = ring.add_communicator(Communicator("0", "dp", RANKS))
    for sequence in range(1, 6):
        reduce(ring, group, sequence)
    time.sleep(0.02)
    seen = reader.read()
    assert seen is not None
    assert (seen.groups[0].name, seen.groups[0].role, seen.groups[0].ranks) == ("0", "dp", RANKS)
    assert (seen.progress.entered[0], seen.progress.completed[0], seen.progress.open_type[0]) == (5, 5, 0)
    assert 0.02 <= seen.progress.idle_s[0] < 5
    assert np.isnan(seen.progress.open_age_s[0])
    again = reader.read()
    assert again is not None
    assert (again.progress.entered[0], again.progress.completed[0]) == (5, 5), "known though nothing is new in the ring"


def test_progress_of_a_rank_inside_an_operation_with_its_connections(ring: RingWriter, reader: NodeReader) -> None:
    group = ring.add_communicator(Communicator("0", "dp", RANKS))
    reduce(ring, group, 1)
    op_id = reduce(ring, group, 2, end=False)
    out, into = ring.open_edges(op_id, 2, group, 3, 0, 1)
    out.begun()
    out.begun()
    into.received(10, 20)
    reduce(ring, group, 3)  # a later one may end first
    seen = reader.read()
    assert seen is not None
    row = seen.progress
    assert (row.entered[0], row.completed[0], row.open_type[0]) == (3, 1, OpType.ALL_REDUCE)
    assert (row.open_dtype[0], row.open_bytes[0]) == (ElementType.FLOAT32, 4096)
    assert row.open_age_s[0] >= 0
    links = {
        (int(s), int(d)): place
        for place, (s, d) in enumerate(zip(seen.links.source, seen.links.destination, strict=True))
    }
    assert (seen.links.sent_messages[links[(0, 1)]], seen.links.received_messages[links[(0, 1)]]) == (2, -1)
    assert (seen.links.sent_messages[links[(3, 0)]], seen.links.received_messages[links[(3, 0)]]) == (-1, 1)
    assert seen.links.sequence.tolist() == [2, 2]


def test_blocks_come_once_and_again_on_demand(ring: RingWriter, reader: NodeReader) -> None:
    group = ring.add_communicator(Communicator("0", "dp", RANKS))
    for sequence in range(1, 10):
        reduce(ring, group, sequence)
    seen = reader.read()
    assert seen is not None
    assert len(seen.blocks.block) == 0
    assert reader.with_blocks(seen).blocks.block.tolist() == [0, 1]
    assert reader.with_blocks(seen).blocks.block.tolist() == []
    reader.whole_window()
    seen = reader.read()
    assert seen is not None
    assert reader.with_blocks(seen).blocks.block.tolist() == [0, 1]


def test_a_mismatched_operation_stays_open_though_it_raised(ring: RingWriter, reader: NodeReader) -> None:
    group = ring.add_communicator(Communicator("0", "dp", RANKS))
    reduce(ring, group, 1)
    reduce(ring, group, 2, flags=OpFlag.FAILED | OpFlag.MISMATCH)
    for _ in range(2):
        seen = reader.read()
        assert seen is not None
        assert (seen.progress.entered[0], seen.progress.completed[0], seen.progress.open_type[0]) == (
            2,
            1,
            OpType.ALL_REDUCE,
        )


def test_the_step_is_learnt_from_the_repetition_of_operations(ring: RingWriter, reader: NodeReader) -> None:
    group = ring.add_communicator(Communicator("0", "dp", RANKS))
    for step in range(8):
        for size in (4096, 64):
            op_id = ring.enter(group, 2 * step + (size == 64) + 1, OpType.ALL_REDUCE, ElementType.FLOAT32, size)
            ring.end(op_id)
        time.sleep(0.02)
    seen = reader.read()
    assert seen is not None
    assert 0.02 <= seen.ranks.step_s[0] < 1


def test_a_ring_of_another_layout_is_no_reason_to_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / f"run.g1.r0.p{os.getpid()}.ring"
    path.write_bytes(b"nonsense" * 200)
    reader = NodeReader("n0", tmp_path, "run")
    reader.watch(1, [Worker(0, "n0", "host", os.getpid())])
    assert reader.read() is not None
    assert reader.read() is not None
    assert len([record for record in caplog.records if "cannot be read" in record.message]) == 1


WORKER = """
import sys, time
from pathlib import Path
from actors.c4.recorder.layout import Communicator
from actors.c4.recorder.ring import new_ring
ring = new_ring(Path(sys.argv[1]), "run", 1, 2, 4)
group = ring.add_communicator(Communicator("0", "dp", (0, 1, 2, 3)))
op = ring.enter(group, 1, 1, 1, 64)
if "failed" in sys.argv:
    ring.end(op, 1)
if "closed" in sys.argv:
    ring.close()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def worker(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", WORKER, str(tmp_path), *getattr(request, "param", ())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def state_after(process: subprocess.Popen, folder: Path, signal_number: int) -> tuple[ProcessState, float]:
    reader = NodeReader("n0", folder, "run")
    reader.watch(1, [Worker(2, "n0", "host", process.pid)])
    reader.read()
    process.send_signal(signal_number)
    if signal_number == signal.SIGKILL:
        process.wait()
    else:
        while (facts := processes.look(process.pid)) is None or facts.state is not ProcessState.STOPPED:
            time.sleep(0.01)
    assert reader.glance(60.0) is (process.args[-1] not in ("failed", "closed"))  # type: ignore[index]
    seen = reader.read()
    assert seen is not None
    return ProcessState(int(seen.ranks.process_state[0])), float(seen.ranks.heartbeat_age_s[0])


def test_a_stopped_process_is_stopped(worker: subprocess.Popen, tmp_path: Path) -> None:
    state, age_s = state_after(worker, tmp_path, signal.SIGSTOP)
    assert state is ProcessState.STOPPED
    assert age_s >= 0


def test_a_killed_process_is_gone_and_its_records_are_there(worker: subprocess.Popen, tmp_path: Path) -> None:
    state, _ = state_after(worker, tmp_path, signal.SIGKILL)
    assert state is ProcessState.GONE


@pytest.mark.parametrize("worker", [["failed"], ["closed"]], indirect=True)
def test_a_process_that_ended_in_order_or_because_of_a_peer_is_not_called_gone(worker, tmp_path: Path) -> None:
    state, age_s = state_after(worker, tmp_path, signal.SIGKILL)
    assert state is ProcessState.UNKNOWN
    assert np.isnan(age_s)


def test_another_process_under_the_number_is_not_the_worker(worker: subprocess.Popen, tmp_path: Path) -> None:
    facts = processes.look(worker.pid)
    assert facts is not None
    assert processes.state_of(worker.pid, facts.started_ticks) is not ProcessState.GONE
    assert processes.state_of(worker.pid, facts.started_ticks - 1) is ProcessState.GONE
    assert not processes.kill(worker.pid, facts.started_ticks - 1), "the identity is wrong: nobody is killed"
    assert worker.poll() is None
    assert processes.kill(worker.pid, facts.started_ticks)
    assert worker.wait(10) == -signal.SIGKILL
