"""Handles of operations under way: the heartbeat's poll never waits for a message that another thread already took."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

from actors.c4.recorder.recorder import Recorder, RecordingConfig
from actors.c4.recorder.records import ElementType, OpFlag, OpType
from actors.c4.recorder.works import RecordedWork


class GlooReceive:
    """As gloo's receive behaves (tried with torch 2.13): complete only inside a wait; each wait takes one message."""

    def __init__(self) -> None:
        self.messages = threading.Semaphore(0)
        self.done = False

    def wait(self, timeout: timedelta | None = None) -> bool:
        if not self.messages.acquire(timeout=5):
            raise RuntimeError("Timed out waiting for a second message.")
        self.done = True
        return True

    def is_completed(self) -> bool:
        return self.done


class GlooCollective:
    """Completes by itself; its wait raises when it failed."""

    def __init__(self, error: str = ""):
        self.error = error

    def wait(self) -> bool:
        if self.error:
            raise RuntimeError(self.error)
        return True

    def is_completed(self) -> bool:
        return True


def opened(tmp_path: Any, inner: Any) -> tuple[Recorder, RecordedWork]:
    made = Recorder(RecordingConfig("run", 0, 0, 2, str(tmp_path), heartbeat_s=60))
    index = made.communicator("0", "", (0, 1))
    return made, RecordedWork(inner, made.ring, made.ring.enter(index, 1, OpType.RECV, ElementType.FLOAT32, 4))


def flags(made: Recorder) -> list[int]:
    return [int(one["flags"]) for one in _records(made) if one["end_ns"]]


def _records(made: Recorder) -> Any:
    from actors.c4.recorder.reader import RingReader

    assert made.path is not None
    with RingReader(made.path) as reader:
        return reader.read().operations


def test_a_receive_that_was_waited_for_is_not_waited_for_again(tmp_path: Any) -> None:
    inner = GlooReceive()
    made, work = opened(tmp_path, inner)
    assert not work.poll()
    inner.messages.release()
    assert work.wait()
    polls: list[bool] = []
    polling = threading.Thread(target=lambda: polls.append(work.poll()), daemon=True)
    polling.start()
    polling.join(2)
    assert polls == [True]
    assert flags(made) == [0]
    made.close()


def test_a_collective_nobody_waits_for_is_closed_as_it_ended(tmp_path: Any) -> None:
    made, work = opened(tmp_path / "one", GlooCollective())
    failed_in, failed = opened(tmp_path / "two", GlooCollective("Connection closed by peer"))
    assert work.poll()
    assert failed.poll()
    assert flags(made) == [0]
    assert flags(failed_in) == [OpFlag.FAILED]
    made.close()
    failed_in.close()
