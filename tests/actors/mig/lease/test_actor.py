"""The lease actor in a real Ray: a worker gets its environment before torch, and SIGKILL gives the slice back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import ray

from actors.mig.backends import BackendError, SliceInUse, SliceVanished
from actors.mig.lease.actor import ACTOR_OPTIONS, BackendSpec, SliceLeaser
from actors.mig.lease.worker import take_slice

SPEC = BackendSpec("cpu", layout=("cpu4of7", "cpu3of7"), memory_mib=7000)


class Worker:
    def __init__(self, resource: str, leaser) -> None:
        import sys

        # Ray's own worker may hold torch from a job before; the order is what is tested.
        self.torch_before = "torch" in sys.modules
        self.slice = take_slice(resource, leaser=leaser)

    def about(self) -> tuple[int, str, dict[str, str], int]:
        names = ("SEXTANT_SLICE_UUID", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        return (
            os.getpid(),
            self.slice.slice.uuid,
            {name: os.environ[name] for name in names},
            len(os.sched_getaffinity(0)),
        )


@pytest.fixture
def leaser(ray_local):
    # An actor of the test's own, where an application asks node_leaser for the node's.
    handle = ray.remote(SliceLeaser).options(**ACTOR_OPTIONS).remote(SPEC)
    yield handle
    ray.get(handle.close.remote())
    ray.kill(handle)


def get(reference):
    try:
        return ray.get(reference, timeout=60)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def test_a_killed_worker_gives_its_slice_back_and_a_vanished_slice_is_told(leaser) -> None:
    worker = ray.remote(Worker).options(num_cpus=0).remote("cpu_cpu4of7", leaser)
    pid, uuid, variables, cores = get(worker.about.remote())
    assert variables["SEXTANT_SLICE_UUID"] == uuid
    assert variables["CUDA_VISIBLE_DEVICES"] == ""
    assert cores == len(os.sched_getaffinity(0))

    with pytest.raises(SliceInUse, match=f"{uuid} by process {pid}"):
        get(leaser.lease.remote("cpu_cpu4of7", os.getpid()))
    with pytest.raises(SliceInUse, match="is leased to process"):
        get(leaser.recut.remote(("cpu7of7",)))
    with pytest.raises(BackendError, match="does not run on this node"):
        get(leaser.lease.remote("cpu_cpu3of7", 2**22 + 1))

    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while get(leaser.held.remote()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert get(leaser.held.remote()) == ()
    assert len(get(leaser.free.remote())) == 2

    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        grant = get(leaser.lease.remote("cpu_cpu4of7", child.pid))
        get(leaser.release.remote(grant.number))
        assert get(leaser.recut.remote(("cpu7of7",))) == 3
        with pytest.raises(SliceVanished, match="no slice cpu_cpu4of7"):
            get(leaser.lease.remote("cpu_cpu4of7", child.pid))
    finally:
        child.communicate(b"\n")


def test_a_slice_asked_for_after_torch_is_refused(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", object())
    with pytest.raises(BackendError, match="torch is imported already"):
        take_slice("mig_1g_10gb")
