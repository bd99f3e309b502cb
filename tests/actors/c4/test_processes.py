"""How long a thread waits for a processor, from Linux' scheduler statistics."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.c4 import processes
from actors.c4.recorder.recorder import HEARTBEAT_THREAD

WORKER = """
import sys, time
from actors.c4.recorder.recorder import Recorder, RecordingConfig
made = Recorder(RecordingConfig("run", 0, 0, 1, sys.argv[1], heartbeat_s=0.01))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[int]:
    made = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert made.stdout is not None
    assert made.stdout.readline() == "ready\n"
    yield made.pid
    made.kill()
    made.wait()


def schedstat(folder: Path, delay_ns: int, turns: int, state: str) -> None:
    (folder / "schedstat").write_text(f"1000 {delay_ns} {turns}\n")
    (folder / "stat").write_text(f"7 (a (strange) name) {state} 1 1\n")


def test_the_mean_over_turns_and_a_wait_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = processes.ThreadDelay(1, "heart", every_s=1.0)
    monkeypatch.setattr(watch, "_task", tmp_path)
    schedstat(tmp_path, 5_000_000, 100, "S")
    assert math.isnan(watch.look(10.0))  # a mean needs two looks
    schedstat(tmp_path, 5_000_000 + 20 * 3_000_000, 120, "S")
    assert watch.look(11.0) == pytest.approx(0.003)
    schedstat(tmp_path, 5_000_000 + 20 * 3_000_000, 120, "R")  # runnable, and not a turn more
    assert watch.look(11.5) == pytest.approx(0.003)
    assert watch.look(11.9) == pytest.approx(0.4)
    schedstat(tmp_path, 5_000_000 + 20 * 3_000_000 + 10_000_000, 140, "R")
    assert watch.look(12.0) == pytest.approx(0.0005)


def test_the_heartbeat_thread_of_a_worker_is_found_by_its_name(worker: int) -> None:
    watch = processes.ThreadDelay(worker, HEARTBEAT_THREAD, every_s=0.1)
    watch.look(time.monotonic())
    time.sleep(0.3)
    assert 0 <= watch.look(time.monotonic()) < 5
    assert math.isnan(processes.ThreadDelay(worker, "no such thread").look(1.0))
    assert math.isnan(processes.ThreadDelay(2**22 + 1, HEARTBEAT_THREAD).look(1.0))
