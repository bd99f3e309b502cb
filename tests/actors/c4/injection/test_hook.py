"""The hook in a worker: a stand-in for the process group, whose loop calls operations and knows nothing of faults."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.c4.injection import hook as hook_module
from actors.c4.injection.faults import ENVIRONMENT, Fault, FaultName, InjectionError
from actors.c4.injection.hook import Hook, InjectedError
from actors.c4.injection.inject import Target, inject
from actors.c4.processes import look


def make_group() -> type:
    class Group:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def allreduce(self, tensors: list[object], opts: object = None) -> str:
            self.calls.append("allreduce")
            return "reduced"

        def broadcast(self, tensors: list[object]) -> str:
            self.calls.append("broadcast")
            return "broadcast"

    return Group


class Loop:
    """A user's loop in a thread, with operations every 10 ms."""

    def __init__(self, group: object):
        self.group, self.ended, self.raised = group, threading.Event(), None
        self.results: list[object] = []
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while not self.ended.is_set():
                self.results.append(self.group.allreduce([1]))  # type: ignore[attr-defined]
                time.sleep(0.01)
        except Exception as error:
            self.raised = error


@pytest.fixture
def hooked(tmp_path: Path) -> Iterator[tuple[Loop, Target, Path]]:
    marks = [0]
    hook = Hook(tmp_path, lambda: marks[0])
    group_class = make_group()
    hook.wrap(group_class)
    hook.start()
    group = group_class()
    group.marks = marks
    loop = Loop(group)
    facts = look(hook.pid)
    assert facts is not None
    yield loop, Target(0, hook.pid, facts.started_ticks), tmp_path
    loop.ended.set()
    loop.thread.join(timeout=10)


def test_without_a_fault_nothing_changes(hooked) -> None:
    loop, _, _ = hooked
    time.sleep(0.1)
    assert set(loop.results) == {"reduced"}
    assert set(loop.group.calls) == {"allreduce"}


def test_one_operation_is_called_in_place_of_another_once(hooked) -> None:
    loop, target, folder = hooked
    inject(Fault(FaultName.MISMATCHED_COLLECTIVE, 0), target, folder)
    time.sleep(0.1)
    assert loop.group.calls.count("broadcast") == 1
    assert loop.group.calls[-1] == "allreduce"


def test_one_operation_is_left_out_and_looks_done(hooked) -> None:
    torch = pytest.importorskip("torch")
    loop, target, folder = hooked
    loop.ended.set()
    loop.thread.join()
    tensor = torch.ones(3)
    before = list(loop.group.calls)
    taken = threading.Thread(target=inject, args=(Fault(FaultName.SKIPPED_COLLECTIVE, 0), target, folder))
    taken.start()
    while (work := loop.group.allreduce([tensor])) == "reduced":
        time.sleep(0.01)
    taken.join()
    assert loop.group.calls.count("allreduce") >= len(before)
    assert work.wait()
    assert work.get_future().value()[0] is tensor
    assert loop.group.allreduce([tensor]) == "reduced"


def test_the_users_loop_gets_the_error(hooked) -> None:
    loop, target, folder = hooked
    inject(Fault(FaultName.RAISE_ERROR, 0), target, folder)
    loop.thread.join(timeout=10)
    assert isinstance(loop.raised, InjectedError)


def test_work_is_stretched_until_it_is_taken_back(hooked) -> None:
    loop, target, folder = hooked
    loop.ended.set()
    loop.thread.join()
    group = loop.group
    taken: list[object] = []
    injecting = threading.Thread(
        target=lambda: taken.append(inject(Fault(FaultName.SLOW_COMPUTE, 0, factor=4), target, folder))
    )
    injecting.start()
    while not taken:  # it answers at the first operation
        group.marks[0] = time.monotonic_ns()
        group.allreduce([1])
        time.sleep(0.005)
    group.marks[0] = time.monotonic_ns()
    time.sleep(0.05)  # the rank's own work
    began = time.monotonic()
    group.allreduce([1])
    assert time.monotonic() - began >= 0.15, "three times as long again"
    taken[0].stop()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        group.marks[0] = time.monotonic_ns() - 10**9
        began = time.monotonic()
        group.allreduce([1])
        if time.monotonic() - began < 0.5:
            return
    pytest.fail("the work is still stretched")


def test_a_worker_that_does_not_listen_is_a_sentence_and_leaves_no_fault_behind(tmp_path: Path) -> None:
    facts = look(1)
    assert facts is not None
    with pytest.raises(InjectionError, match="did not take pause"):
        inject(Fault(FaultName.PAUSE, 0, duration_s=1), Target(0, 1, facts.started_ticks), tmp_path, wait_s=0.1)
    assert "pause" not in (tmp_path / "faults-1.json").read_text()
    with pytest.raises(InjectionError, match="not started with fault injection enabled"):
        inject(Fault(FaultName.PAUSE, 0, duration_s=1), Target(0, 1, facts.started_ticks), tmp_path / "nowhere")


def test_it_is_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert hook_module.enabled() is None
    assert hook_module.install_in_worker() is None


GIL = """
import os, sys, threading, time
from pathlib import Path
from actors.c4.injection.hook import Hook
beats = Path(sys.argv[1]) / "beats"
def beat():
    while True:
        beats.write_text(str(time.monotonic()))
        time.sleep(0.01)
threading.Thread(target=beat, daemon=True).start()
Hook(Path(sys.argv[1]), lambda: 0).start()
print("ready", flush=True)
time.sleep(600)
"""


def test_a_gil_lock_stops_every_python_thread_though_signals_come(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", GIL, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        facts = look(process.pid)
        assert facts is not None
        injected = inject(
            Fault(FaultName.GIL_LOCK, 0, duration_s=1.5), Target(0, process.pid, facts.started_ticks), tmp_path
        )
        time.sleep(0.2)
        last = (tmp_path / "beats").read_text()
        process.send_signal(28)  # SIGWINCH, which does nothing but interrupt
        time.sleep(0.5)
        assert (tmp_path / "beats").read_text() == last
        # A beat that the lock caught in the middle of its writing tells a time before the lock: it does not count.
        at_s, deadline = injected.at_ns / 1e9, time.monotonic() + 20
        while (beat := float((tmp_path / "beats").read_text() or 0)) <= at_s + 0.5:
            assert time.monotonic() < deadline, "the lock was not given back"
            time.sleep(0.05)
        assert beat - at_s > 1.2
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
