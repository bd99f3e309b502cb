"""The double is only worth something while it looks like the real module: signatures, structures and constants are compared."""

from __future__ import annotations

import inspect

import pynvml
import pytest

from tests.actors.mig import fake_pynvml, fake_pynvml_types
from tests.actors.mig.fake_pynvml import FakeNvml

FUNCTIONS = sorted(name for name in vars(FakeNvml) if name.startswith("nvml"))
STRUCTURES = sorted(
    name for name, value in vars(fake_pynvml_types).items() if name.startswith("c_nvml") and hasattr(value, "_fields_")
)


def parameters(function):
    return [
        (parameter.name, parameter.default, parameter.kind)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self"
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_the_double_has_the_real_ones_signature(name):
    assert parameters(getattr(FakeNvml, name)) == parameters(getattr(pynvml, name))


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_of_the_double_has_the_real_ones_fields(name):
    def fields(structure):
        return [(field, kind.__name__) for field, kind in structure._fields_]

    assert fields(getattr(fake_pynvml_types, name)) == fields(getattr(pynvml, name))


def test_the_controller_uses_nothing_that_the_double_or_the_real_module_lacks():
    import re

    from actors.mig.controller import controller, nvml

    used = set()
    for module in (controller, nvml):
        used |= set(re.findall(r"(?:module|nvml)\.((?:nvml|NVML|c_nvml)\w+)", inspect.getsource(module)))
    assert len(used) > 30
    double = FakeNvml("A100-80GB")
    assert not [name for name in used if not hasattr(pynvml, name)]
    assert not [name for name in used if not hasattr(double, name)]


def test_profile_enums_are_the_real_modules():
    for table in (fake_pynvml.SEVEN, fake_pynvml.FOUR):
        names = {"1g": "1_SLICE", "1g+me": "1_SLICE_REV1", "1g2": "1_SLICE_REV2", "2g+me": "2_SLICE_REV1"}
        for kind, row in table.items():
            name = names.get(kind, f"{kind[0]}_SLICE")
            assert row[0] == getattr(pynvml, f"NVML_GPU_INSTANCE_PROFILE_{name}")
    for slices, (enum, _) in fake_pynvml.COMPUTE.items():
        assert enum == getattr(pynvml, f"NVML_COMPUTE_INSTANCE_PROFILE_{slices}_SLICE")


def test_the_real_modules_errors_carry_the_code_that_the_controller_reads():
    assert pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION).value == pynvml.NVML_ERROR_NO_PERMISSION
