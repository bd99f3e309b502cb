"""Stacks of another process: also while it is stopped; and a reason when there are none."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from actors.c4.monitors import stacks

CODE = """
import time
def the_loop():
    print("ready", flush=True)
    time.sleep(600)
the_loop()
"""


@pytest.mark.skipif(stacks.py_spy_path() is None, reason="py-spy is not installed")
def test_a_stopped_process_shows_where_it_stands() -> None:
    process = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        process.send_signal(signal.SIGSTOP)
        text = stacks.take(process.pid)
        assert "the_loop" in text or "ermission" in text, text
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def test_a_process_that_is_gone_is_a_sentence() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert stacks.take(process.pid).startswith(f"[no stacks of process {process.pid}: ")


def test_without_py_spy_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "py_spy_path", lambda: None)
    assert "py-spy is not installed" in stacks.take(1)
