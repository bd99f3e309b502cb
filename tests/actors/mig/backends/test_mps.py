"""MPS: the daemon is probed, is ours alone, never makes the GPU exclusive, and is ended whatever happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.mig.backends import BackendUnavailable
from actors.mig.backends.mps import MpsBackend, MpsDaemon
from tests.actors.mig.backends.doubles import FakeMpsDaemon


def backend(fake: FakeMpsDaemon, memory_mib: float | None = None) -> MpsBackend:
    return MpsBackend(0, memory_mib, MpsDaemon(0, fake.run, lambda name: f"/usr/bin/{name}"))


def test_a_slice_is_a_percentage_and_a_memory_limit_in_folders_of_our_own() -> None:
    fake = FakeMpsDaemon()
    mps = backend(fake, memory_mib=80_000)
    mps.repartition(["mps43", "mps28", "mps28"])
    variables = dict(mps.lease(mps.slices()[0].uuid).environment)
    assert variables["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "43"
    assert variables["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=34400M"
    folder = Path(variables["CUDA_MPS_PIPE_DIRECTORY"])
    assert folder.is_dir()
    assert fake.running == {str(folder)}
    mps.close()
    assert not fake.running
    assert not folder.exists()
    assert not any("EXCLUSIVE" in str(call) for call in fake.calls)


def test_no_daemon_a_refused_start_and_silence_are_told_and_leave_nothing() -> None:
    with pytest.raises(BackendUnavailable, match="no nvidia-cuda-mps-control on this machine"):
        MpsBackend(0, None, MpsDaemon(0, FakeMpsDaemon().run, lambda name: None)).create("mps14")
    for fake, sentence in (
        (FakeMpsDaemon(starts=False), "already running"),
        (FakeMpsDaemon(answers=False), "did not answer within"),
    ):
        mps = backend(fake)
        with pytest.raises(BackendUnavailable, match=sentence):
            mps.create("mps14")
        assert not fake.running
        assert mps._daemon.folder is None
        assert not mps.slices()
