"""What every backend owes: profiles, fewest steps, one holder a slice, the right sentence. The same tests for all five."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from actors.mig.backends import (
    BackendError,
    NoRoom,
    NoSuchProfile,
    SliceBackend,
    SliceInUse,
    SliceVanished,
    make_backend,
)
from actors.mig.backends.cpu import CpuBackend
from actors.mig.backends.green import GreenBackend
from actors.mig.backends.green_driver import GreenDriver
from actors.mig.backends.mig import MigBackend
from actors.mig.backends.mps import MpsBackend, MpsDaemon
from actors.mig.backends.simulated import SimBackend
from tests.actors.mig.backends.doubles import FakeCuda, FakeMpsDaemon
from tests.actors.mig.fake_pynvml import FakeNvml

MAKE = {
    "cpu": lambda: CpuBackend(memory_mib=7000),
    "sim": lambda: SimBackend("H100-80GB"),
    "mig": lambda: MigBackend(0, FakeNvml("H100-80GB")),
    "green": lambda: GreenBackend(0, 80_000, lambda gpu: GreenDriver(gpu, FakeCuda())),
    "mps": lambda: MpsBackend(0, 80_000, MpsDaemon(0, FakeMpsDaemon().run, lambda name: f"/usr/bin/{name}")),
}


@pytest.fixture(params=list(MAKE))
def backend(request):
    made = MAKE[request.param]()
    yield made
    made.close()


def names(backend: SliceBackend) -> Counter[str]:
    return Counter(found.profile for found in backend.slices())


def test_it_is_a_backend(backend) -> None:
    assert isinstance(backend, SliceBackend)
    profiles = backend.profiles()
    shares = [profile.compute_share for profile in profiles]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1
    assert all(profile.most >= 1 for profile in profiles)


def test_as_many_small_slices_fit_as_it_says_and_not_one_more(backend) -> None:
    small = backend.profiles()[0]
    for _ in range(small.most):
        backend.create(small.name)
    assert names(backend)[small.name] == small.most
    with pytest.raises(NoRoom):
        backend.create(small.name)
    assert names(backend)[small.name] == small.most


def test_what_fits_is_what_can_be_cut(backend) -> None:
    small, whole = backend.profiles()[0], backend.profiles()[-1].name
    for wanted in ([small.name] * small.most, [whole], [whole, small.name], [small.name] * (small.most + 1)):
        if backend.fits(wanted):
            backend.repartition(wanted)
            assert names(backend) == Counter(wanted)
        else:
            with pytest.raises(BackendError):
                backend.repartition(wanted)
    assert backend.fits([whole])
    assert not backend.fits([whole, small.name])


def test_repartition_keeps_what_is_wanted_and_there(backend) -> None:
    small, middle = backend.profiles()[0].name, backend.profiles()[-2].name
    assert backend.repartition([small, middle]) == 2
    kept = next(found for found in backend.slices() if found.profile == middle)
    assert backend.repartition([middle]) == 1
    assert [found.uuid for found in backend.slices()] == [kept.uuid]
    assert backend.repartition([middle]) == 0


def test_a_partition_that_cannot_be_leaves_the_old_one(backend) -> None:
    small, whole = backend.profiles()[0].name, backend.profiles()[-1].name
    backend.repartition([small])
    with pytest.raises(BackendError):
        backend.repartition([whole, whole])
    assert names(backend) == Counter([small])
    with pytest.raises(NoSuchProfile, match="9g.900gb"):
        backend.repartition(["9g.900gb"])
    assert names(backend) == Counter([small])


def test_a_leased_slice_is_neither_destroyed_nor_leased_again_nor_cut(backend) -> None:
    small, whole = backend.profiles()[0].name, backend.profiles()[-1].name
    backend.repartition([small])
    (found,) = backend.slices()
    lease = backend.lease(found.uuid)
    for forbidden in (
        lambda: backend.destroy(found.uuid),
        lambda: backend.lease(found.uuid),
        lambda: backend.repartition([whole]),
    ):
        with pytest.raises(BackendError):
            forbidden()
    assert names(backend) == Counter([small])
    backend.release(lease)
    backend.release(lease)  # a second time is no error
    backend.destroy(found.uuid)
    assert not backend.slices()


def test_the_environment_names_the_slice(backend) -> None:
    backend.repartition([backend.profiles()[0].name])
    (found,) = backend.slices()
    variables = dict(backend.lease(found.uuid).environment)
    assert variables["SEXTANT_SLICE_BACKEND"] == backend.name
    assert variables["SEXTANT_SLICE_UUID"] == found.uuid
    assert "CUDA_VISIBLE_DEVICES" in variables
    over = backend.lease  # an existing environment stays below the lease's
    assert over is not None
    assert set(variables) < set(next(iter(backend._held.values())).over({"HOME": "/"}))


def test_a_slice_that_is_gone_cannot_be_leased(backend) -> None:
    backend.repartition([backend.profiles()[0].name])
    (found,) = backend.slices()
    backend.destroy(found.uuid)
    with pytest.raises(SliceVanished, match="does not exist"):
        backend.lease(found.uuid)
    with pytest.raises(SliceVanished):
        backend.destroy(found.uuid)


def test_a_lease_that_was_taken_back_cannot_get_a_process(backend) -> None:
    backend.repartition([backend.profiles()[0].name])
    lease = backend.lease(backend.slices()[0].uuid)
    backend.release(lease)
    with pytest.raises(SliceVanished, match="taken back"):
        backend.attach(lease, os.getpid())


def test_mig_slices_are_real_uuids_and_busy_or_forbidden_gpus_are_refused() -> None:
    nvml = FakeNvml("H100-80GB")
    backend = MigBackend(0, nvml)
    backend.repartition(["3g.40gb", "1g.10gb"])
    uuids = {found.uuid for found in backend.slices()}
    assert all(uuid.startswith("MIG-") for uuid in uuids)
    lease = backend.lease(backend.slices()[0].uuid)
    assert dict(lease.environment)["CUDA_VISIBLE_DEVICES"] == backend.slices()[0].uuid
    backend.release(lease)
    nvml.processes.append((4711, 0, None))
    with pytest.raises(SliceInUse, match="4711"):
        backend.repartition(["7g.80gb"])
    assert {found.uuid for found in backend.slices()} == uuids


@pytest.mark.parametrize(
    ("nvml", "sentence"),
    [
        (FakeNvml("H100-80GB", mig=False), "turn it on first"),
        (FakeNvml("T4"), "has no MIG"),
        (FakeNvml("H100-80GB", root=False), "needs root"),
        (FakeNvml("H100-80GB", library=False), "no NVML library"),
        (FakeNvml(), "no GPU"),
    ],
)
def test_what_stands_in_the_way_of_mig(nvml: FakeNvml, sentence: str) -> None:
    with pytest.raises(BackendError, match=sentence):
        MigBackend(0, nvml).slices()
    assert nvml.initialised == 0


def test_make_backend_says_what_there_is() -> None:
    with pytest.raises(BackendError, match="There is no backend 'tpu': there are cpu, mig"):
        make_backend("tpu")
    with pytest.raises(BackendError, match="number of a GPU"):
        make_backend("mig", gpu="A100")
    with pytest.raises(BackendError, match="No MIG table"):
        make_backend("sim", gpu="V100")
