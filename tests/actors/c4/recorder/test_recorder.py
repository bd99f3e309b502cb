"""The recorder of a process: it never costs a training its life, and its ring is readable in every state of the process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from actors.c4.recorder.errors import RecorderError
from actors.c4.recorder.files import dump_stack
from actors.c4.recorder.reader import RingReader, discover
from actors.c4.recorder.recorder import Recorder, RecordingConfig
from actors.c4.recorder.records import OpType


def config(folder: Path, **changes: object) -> RecordingConfig:
    return RecordingConfig(
        **{"run": "r", "generation": 0, "rank": 0, "world_size": 2, "directory": str(folder), **changes}
    )  # type: ignore[arg-type]


def until(what: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_without_a_place_for_the_ring_training_goes_on_unrecorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    recorder = Recorder(config(tmp_path / "file" / "rings"))
    group = recorder.communicator("0", "", (0, 1))
    recorder.ring.end(recorder.ring.enter(group, 1, OpType.BARRIER, 0, 0))
    assert recorder.path is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not recorded" in caplog.text
    recorder.close()
    with pytest.raises(RecorderError, match="cannot be made"):
        Recorder(config(tmp_path / "file" / "rings", required=True))


def test_a_full_memory_is_an_error_at_the_start_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RecorderError, match="No space left"):
        Recorder(config(tmp_path, required=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"rank": 2}, {"generation": -1}, {"heartbeat_s": 0.0}])
def test_a_configuration_that_makes_no_sense_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(RecorderError):
        config(tmp_path, **changes)


def test_the_heart_beats_until_the_end_and_polls_what_it_was_given(tmp_path: Path) -> None:
    class Work:
        asked = 0

    recorder = Recorder(config(tmp_path, heartbeat_s=0.005))
    assert recorder.path is not None
    patient, hopeless, gone = Work(), Work(), Work()

    def third_time(work: Work) -> bool:
        work.asked += 1
        return work.asked == 3

    def fails(work: Work) -> bool:
        work.asked += 1
        raise RuntimeError("no")

    recorder.watch(patient, third_time)
    recorder.watch(hopeless, fails)
    recorder.watch(gone, third_time)
    del gone
    with RingReader(recorder.path) as reader:
        first = reader.read().heartbeat_ns
        assert until(lambda: reader.read().heartbeat_ns > first)
        assert until(lambda: not recorder._watched)
        assert (patient.asked, hopeless.asked) == (3, 1)
        recorder.close()
        recorder.close()
        last = reader.read()
        assert last.closed_ns > 0
        assert last.heartbeat_ns == reader.read().heartbeat_ns


def test_names_are_given_once(tmp_path: Path) -> None:
    recorder = Recorder(config(tmp_path))
    assert [recorder.unique_name(name) for name in ("0", "1", "0", "0")] == ["0", "1", "0#2", "0#3"]
    recorder.close()


WORKER = """
import ctypes, sys, time
from actors.c4.recorder.recorder import Recorder, RecordingConfig
recorder = Recorder(RecordingConfig("w", 0, 0, 1, directory=sys.argv[1], heartbeat_s=0.01))
op = recorder.ring.enter(recorder.communicator("0", "dp", (0,)), 1, 1, 1, 64)

def hold_the_lock():
    library = ctypes.PyDLL(None)  # keeps Python's lock during calls
    sys.setswitchinterval(1000)
    while True:
        library.sleep(1000)

print("ready", flush=True)
if sys.stdin.readline().strip() == "lock":
    hold_the_lock()
"""


@contextmanager
def worker(folder: Path) -> Iterator[tuple[subprocess.Popen[str], RingReader]]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (found,) = [one for one in discover(folder) if one.pid == process.pid]
        with RingReader(found.path) as reader:
            yield process, reader
    finally:
        process.kill()
        process.wait()


def say(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text + "\n")
    process.stdin.flush()


def is_stale(reader: RingReader) -> bool:
    """No beat in fifty times the interval."""
    before = reader.read().heartbeat_ns
    time.sleep(0.5)
    return reader.read().heartbeat_ns == before


def sees_the_open_operation(reader: RingReader) -> bool:
    seen = reader.read()
    return list(seen.open_operations["sequence"]) == [1] and seen.closed_ns == 0


def test_a_running_worker(tmp_path: Path) -> None:
    with worker(tmp_path) as (_, reader):
        before = reader.read().heartbeat_ns
        assert until(lambda: reader.read().heartbeat_ns > before)
        assert sees_the_open_operation(reader)
        assert "<module>" in dump_stack(reader.path, reader.identity, timeout_s=30)


def test_a_worker_that_holds_the_lock(tmp_path: Path) -> None:
    with worker(tmp_path) as (process, reader):
        say(process, "lock")
        assert until(lambda: is_stale(reader))
        assert sees_the_open_operation(reader)
        assert reader.identity.alive()
        assert "hold_the_lock" in dump_stack(reader.path, reader.identity, timeout_s=30)


def test_a_stopped_worker(tmp_path: Path) -> None:
    with worker(tmp_path) as (process, reader):
        process.send_signal(signal.SIGSTOP)
        assert until(lambda: is_stale(reader))
        assert sees_the_open_operation(reader)
        assert reader.identity.alive()
        assert dump_stack(reader.path, reader.identity, timeout_s=0.1) == ""
        process.send_signal(signal.SIGCONT)
        before = reader.read().heartbeat_ns
        assert until(lambda: reader.read().heartbeat_ns > before)


def test_a_killed_worker(tmp_path: Path) -> None:
    with worker(tmp_path) as (process, reader):
        process.kill()
        process.wait()
        assert sees_the_open_operation(reader)
        assert not reader.identity.alive()
        assert dump_stack(reader.path, reader.identity) == ""


def test_a_worker_that_ends_by_itself_says_so(tmp_path: Path) -> None:
    with worker(tmp_path) as (process, reader):
        say(process, "end")
        process.wait()
        assert reader.read().closed_ns > 0
