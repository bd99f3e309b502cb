"""Philox4x32-10 against the known answers of Random123, and one number on every path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kernels import build
from kernels.sampling import philox

# Random123, tests/kat_vectors: counter, key, answer
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
INT64 = st.integers(-(2**63), 2**63 - 1)


@pytest.mark.parametrize("counter,key,answer", KNOWN)
def test_known_answers(counter, key, answer):
    assert philox.philox4x32(counter, key) == answer


@given(INT64, INT64)
def test_python_torch_and_cpp_agree(seed, position):
    number = philox.uniform(seed, position)
    assert 0 <= number < 1
    assert philox.uniform_torch(torch.tensor([seed]), torch.tensor([position])).item() == number
    assert philox.uniform(seed % 2**64, position % 2**64) == number
    if build.load("sampling"):
        assert torch.ops.sextant.sampling_uniform(seed, position) == number


def test_uniform_is_uniform_over_positions_and_seeds():
    positions = philox.uniform_torch(torch.full((20_000,), 5), torch.arange(20_000)).numpy()
    seeds = philox.uniform_torch(torch.arange(20_000), torch.full((20_000,), 7)).numpy()
    for numbers in (positions, seeds):
        assert stats.kstest(numbers, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
