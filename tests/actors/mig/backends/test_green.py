"""Green contexts: our prototypes are cuda.h's, SMs are disjoint, nothing is left behind, errors are sentences."""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from actors.mig.backends import BackendUnavailable, NoRoom
from actors.mig.backends.green import GreenBackend
from actors.mig.backends.green_driver import _EXPORTED, PROTOTYPES, DevResource, GreenDriver, GreenPartition, SmResource
from tests.actors.mig.backends.doubles import FakeCuda


@pytest.fixture(scope="module")
def header() -> str:
    """cuda.h, as Triton's wheel brings it."""
    spec = importlib.util.find_spec("triton")
    path = Path(spec.origin).parent / "backends/nvidia/include/cuda.h" if spec and spec.origin else Path("none")
    if not path.is_file():
        pytest.skip("no cuda.h: triton is not installed")
    return path.read_text()


def declared(header: str, name: str) -> tuple[str, ...]:
    """Argument types of a function of the header, without the names."""
    match = re.search(rf"^CUresult CUDAAPI {name}\(([^;]*)\);", header, re.MULTILINE)
    assert match, name
    types = []
    for argument in match[1].split(","):
        argument = " ".join(argument.split())
        kind = re.match(r"(.*?[*\s])\s*\w+$", argument)
        assert kind, argument
        types.append(re.sub(r"\s*\*", "*", kind[1]).strip())
    return tuple(types)


def without_handles(kind: str) -> str:
    return re.sub(r"\s+", " ", kind)


@pytest.mark.parametrize("name", list(PROTOTYPES))
def test_prototypes_are_those_of_cuda_h(header: str, name: str) -> None:
    assert declared(header, name) == PROTOTYPES[name][0]
    written, passed = PROTOTYPES[name]
    assert len(written) == len(passed)
    for text, kind in zip(written, passed, strict=True):
        if text.endswith("*"):
            assert kind is ctypes.c_char_p or issubclass(kind, ctypes._Pointer)
        elif text in ("int", "CUdevice", "CUdevResourceType", "CUresult"):
            assert kind is ctypes.c_int
        elif text == "unsigned int":
            assert kind is ctypes.c_uint
        else:
            assert kind is ctypes.c_void_p
    for short, exported in _EXPORTED.items():
        assert re.search(rf"#define {short}\s+(__CUDA_API_PTDS\({exported}\)|{exported})", header)


def test_structures_are_those_of_cuda_h(header: str) -> None:
    body = re.search(r"typedef struct CUdevSmResource_st \{(.*?)\} CUdevSmResource;", header, re.DOTALL)
    assert body
    fields = re.findall(r"^\s*unsigned int (\w+);", body[1], re.MULTILINE)
    assert [name for name, _ in SmResource._fields_] == fields
    padding = re.search(r"_internal_padding\[(\d+)\]", header)
    oversize = re.search(r"#define RESOURCE_ABI_BYTES (\d+)", header)
    assert padding
    assert oversize
    assert DevResource.which.offset == 4 + int(padding[1])
    assert DevResource.nextResource.offset == 4 + int(padding[1]) + int(oversize[1])


def test_torch_names_its_green_contexts_as_we_use_them() -> None:
    from torch.cuda import green_contexts

    assert "num_sms" in inspect.signature(green_contexts.GreenContext.create).parameters
    assert {"set_context", "pop_context", "Stream"} <= set(vars(green_contexts.GreenContext))


def test_contexts_get_disjoint_sms_and_leave_nothing() -> None:
    cuda = FakeCuda()
    with GreenPartition(GreenDriver(0, cuda), [64, 30, 16]) as partition:
        assert partition.sm_counts == [64, 32, 16]  # rounded up by the driver: what is recorded is what there is
        assert len(set(partition.streams)) == 3
        assert sum(cuda.contexts.values()) <= 132
    assert (cuda.contexts, cuda.streams, cuda.primary) == ({}, set(), 0)


def test_all_sms_can_be_taken_and_not_one_more() -> None:
    cuda = FakeCuda()
    with GreenPartition(GreenDriver(0, cuda), [128, 4]) as partition:
        assert partition.sm_counts == [128, 4]
    with pytest.raises(NoRoom, match="16 SMs cannot be split off GPU 0: 4 are left"):
        GreenPartition(GreenDriver(0, cuda), [128, 16])
    assert (cuda.contexts, cuda.streams, cuda.primary) == ({}, set(), 0)


def test_a_failing_driver_leaves_nothing_half_created() -> None:
    cuda = FakeCuda()
    driver = GreenDriver(0, cuda)
    cuda.fail["cuGreenCtxStreamCreate"] = 801
    with pytest.raises(
        BackendUnavailable, match=r"StreamCreate failed on GPU 0: operation not supported \(error 801\)"
    ):
        GreenPartition(driver, [64])
    assert (cuda.contexts, cuda.streams, cuda.primary) == ({}, set(), 0)


def test_an_old_driver_a_missing_gpu_and_no_driver_are_told() -> None:
    with pytest.raises(BackendUnavailable, match="CUDA 12.4 or later"):
        GreenDriver(0, FakeCuda(missing=("cuGreenCtxCreate",)))
    with pytest.raises(BackendUnavailable, match="There is no GPU 3: the CUDA driver sees 1"):
        GreenDriver(3, FakeCuda())


def test_leases_of_several_processes_name_disjoint_sms() -> None:
    backend = GreenBackend(0, 80_000, lambda gpu: GreenDriver(gpu, FakeCuda()))
    assert [profile.name for profile in backend.profiles()] == ["green16", "green32", "green48", "green64", "green132"]
    backend.repartition(["green64", "green32"])
    one, two = (dict(backend.lease(found.uuid).environment) for found in backend.slices())
    assert one["SEXTANT_SLICE_SMS"] == "64"
    assert two["SEXTANT_SLICE_SMS"] == "64,32"  # the worker splits 64 off first, and takes what follows
    assert float(two["SEXTANT_SLICE_MEMORY_FRACTION"]) == pytest.approx(32 / 132, abs=1e-4)
