"""The CPU backend: accounts close the loop, processes always go on in the end, memory is limited, threads and cores fit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from actors.mig.backends import BackendError, BackendUnavailable, SliceVanished
from actors.mig.backends.cpu import CpuBackend
from actors.mig.backends.governor import ARREARS_S, QUANTUM_S, SAVINGS_S, Account, Governor, cpu_seconds

SPIN = "while True: pass"


def simulate(cores: float, seconds: float, delay_s: float, available=lambda t: 1.0) -> float:
    """CPU seconds that a process that always wants to run uses, when every stop comes ``delay_s`` late."""
    now, used, step = 0.0, 0.0, 0.001
    account = Account(cores, os.getpid(), -1, 0.0, 0.0, 0.0)  # runnable, as this process is
    stopped_from = float("inf")
    while now < seconds:
        now += step
        if now < stopped_from:
            used += step * available(now)
        account.settle(now, used)
        if not account.stopped and account.balance_s < 0:
            account.stopped, stopped_from = True, now + delay_s
        elif account.stopped and account.balance_s >= QUANTUM_S and now > stopped_from:
            account.stopped, stopped_from = False, float("inf")
    return used


@pytest.mark.parametrize("cores", [1 / 7, 2 / 7, 4 / 7, 0.9])
@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.03])
def test_the_share_is_exact_in_the_long_run_however_late_the_signals_are(cores: float, delay_s: float) -> None:
    assert simulate(cores, 20, delay_s) / 20 == pytest.approx(cores, rel=0.01)


def test_what_others_took_is_caught_up_within_limits() -> None:
    # For 0.3 s nothing is to be had, later all of it.
    used = simulate(0.5, 5, 0.0, lambda t: 0.0 if 1 < t < 1.3 else 1.0)
    assert used == pytest.approx(2.5, abs=0.02)
    # A whole second is more than is owed to anyone.
    used = simulate(0.5, 5, 0.0, lambda t: 0.0 if 1 < t < 2 else 1.0)
    assert used == pytest.approx(2.5 - (0.5 - ARREARS_S), abs=0.03)


def test_an_idle_slice_saves_no_burst(monkeypatch) -> None:
    monkeypatch.setattr("actors.mig.backends.governor.is_runnable", lambda pid: False)
    account = Account(0.5, 1, -1, 0.0, 0.0, 0.0)
    account.settle(100.0, 0.0)
    assert account.balance_s <= SAVINGS_S


def test_the_clock_of_another_process_is_fine_grained() -> None:
    used = cpu_seconds(os.getpid())
    assert used == pytest.approx(time.process_time(), abs=0.05)
    assert cpu_seconds(2**22 + 1) is None


def test_commands_are_answered_and_the_dead_are_forgotten() -> None:
    governor = Governor(2.0)
    child = subprocess.Popen([sys.executable, "-c", SPIN])
    assert governor.do({"do": "hold", "slice": "a", "cores": 0.5, "pid": child.pid})["ok"]
    assert governor.do({"do": "read", "slice": "a"})["ok"]
    child.kill()
    child.wait()
    governor.step()
    assert not governor.do({"do": "read", "slice": "a"})["ok"]
    assert not governor.do({"do": "hold", "slice": "b", "cores": 0.5, "pid": child.pid})["ok"]
    assert not governor.do({"do": "let_go", "slice": "b"})["ok"]


def wait_for(condition, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


@pytest.fixture
def held():
    """A backend, and a process held to 1/7 of it."""
    backend = CpuBackend(memory_mib=7000)
    backend.repartition(["cpu1of7"])
    lease = backend.lease(backend.slices()[0].uuid)
    child = psutil.Popen([sys.executable, "-c", SPIN], env=lease.over())
    lease = backend.attach(lease, child.pid)
    yield backend, lease, child
    child.kill()
    child.wait()
    backend.close()


def is_stopped(child: psutil.Popen) -> bool:
    return child.status() == psutil.STATUS_STOPPED


def test_a_spinning_process_is_stopped_goes_on_and_is_let_go_at_release(held) -> None:
    backend, lease, child = held
    assert wait_for(lambda: is_stopped(child))
    assert wait_for(lambda: not is_stopped(child))
    use = backend.use(lease.slice.uuid)
    assert use.asked_share == pytest.approx(1 / 7)
    assert 0 < use.achieved_share < 1
    backend.release(lease)
    assert not is_stopped(child)
    with pytest.raises(SliceVanished, match="No process runs in slice"):
        backend.use(lease.slice.uuid)


def test_a_governor_that_is_killed_leaves_nobody_stopped(held) -> None:
    backend, lease, child = held
    assert wait_for(lambda: is_stopped(child))
    os.kill(backend._governor._process.pid, signal.SIGSTOP)  # it can continue nobody any more
    child.suspend()
    os.kill(backend._governor._process.pid, signal.SIGKILL)
    with pytest.raises(BackendError, match="governor has ended unexpectedly"):
        backend.use(lease.slice.uuid)
    assert wait_for(lambda: not is_stopped(child))


def test_an_owner_that_is_killed_leaves_nobody_stopped() -> None:
    code = (
        "import subprocess, sys, time\n"
        "from actors.mig.backends.cpu import CpuBackend\n"
        "backend = CpuBackend()\n"
        "backend.repartition(['cpu1of7'])\n"
        f"child = subprocess.Popen([sys.executable, '-c', {SPIN!r}])\n"
        "backend.attach(backend.lease(backend.slices()[0].uuid), child.pid)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(owner.stdout.readline()))
    try:
        assert wait_for(lambda: is_stopped(child))
        owner.kill()
        owner.wait()
        governors = [p for p in psutil.process_iter(["cmdline"]) if "governor.py" in " ".join(p.info["cmdline"] or [])]
        psutil.wait_procs([p for p in governors if p.ppid() == 1], timeout=20)
        assert not is_stopped(child)
    finally:
        child.kill()
        owner.stdout.close()


def test_a_process_that_is_gone_cannot_be_attached() -> None:
    backend = CpuBackend()
    backend.repartition(["cpu1of7"])
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    try:
        with pytest.raises(BackendError, match="cannot be held to its slice: No such process"):
            backend.attach(backend.lease(backend.slices()[0].uuid), child.pid)
        assert backend.lease(backend.slices()[0].uuid)  # the slice is free again
    finally:
        backend.close()


def test_cores_that_are_not_allowed_are_refused() -> None:
    with pytest.raises(BackendUnavailable, match="not all allowed here"):
        CpuBackend(cores=[10_000])


def test_memory_beyond_the_slice_is_an_error_of_the_allocation() -> None:
    backend = CpuBackend(memory_mib=7 * 200)
    backend.repartition(["cpu1of7"])
    code = (
        "from actors.mig.backends import enter_slice\n"
        "inside = enter_slice()\n"
        "import torch\n"
        "with inside.torch_ready():\n"
        "    torch.zeros(100 * 2**18)\n"
        "    try:\n"
        "        torch.zeros(300 * 2**18)\n"
        "    except RuntimeError as error:\n"
        "        print('refused', torch.get_num_threads())\n"
        "torch.zeros(300 * 2**18)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=backend.lease(backend.slices()[0].uuid).over(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    backend.close()
    assert (done.stdout, done.returncode) == ("refused 1\n", 0), done.stderr
