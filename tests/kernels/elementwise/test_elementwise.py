"""kernels.elementwise against float64, and against transformers' rotary embedding."""

from __future__ import annotations

import pytest
import torch

from kernels import elementwise
from kernels.elementwise import reference


@pytest.mark.parametrize("columns", [1, 15, 16, 64, 570])
def test_rms_norm_equals_float64(columns):
    x, weight = torch.randn(5, columns), torch.randn(columns)
    expected = reference.rms_norm(x.double(), weight.double(), 1e-5)
    assert torch.allclose(elementwise.rms_norm(x, weight, 1e-5).double(), expected, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("columns", [1, 17, 64])
def test_silu_mul_equals_float64_also_far_out(columns):
    gate, up = torch.randn(4, columns) * 40, torch.randn(4, columns)
    gate[0, 0], gate[1, 0], gate[2, 0] = 1e4, -1e4, 0.0
    expected = reference.silu_mul(gate.double(), up.double())
    assert torch.allclose(elementwise.silu_mul(gate, up).double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_rotates_each_pair_by_position_times_frequency(interleaved):
    frequencies = 1.0 / 10000 ** (torch.arange(0, 16, 2) / 16)
    table = elementwise.rope_table(frequencies, 100)
    x, positions = torch.randn(6, 3, 16), torch.tensor([0, 1, 7, 50, 98, 99], dtype=torch.int32)
    y = elementwise.rope(x, positions, table, interleaved)
    pairs = x.unflatten(-1, (8, 2)) if interleaved else torch.stack(x.chunk(2, -1), -1)
    angle = positions[:, None, None].double() * frequencies.double()
    turned = torch.view_as_complex(pairs.double().contiguous()) * torch.polar(torch.ones_like(angle), angle)
    got = y.unflatten(-1, (8, 2)) if interleaved else torch.stack(y.chunk(2, -1), -1)
    assert torch.allclose(got.double(), torch.view_as_real(turned), atol=1e-5)
    assert torch.equal(y[0], x[0])


def test_rope_equals_transformers():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    frequencies = 1.0 / 10000 ** (torch.arange(0, 32, 2).float() / 32)
    positions = torch.arange(20, dtype=torch.int32)
    q, k = torch.randn(20, 4, 32), torch.randn(20, 4, 32)
    angles = torch.cat([positions[:, None] * frequencies] * 2, dim=-1)
    expected = modeling.apply_rotary_pos_emb(q[None], k[None], angles.cos()[None], angles.sin()[None], unsqueeze_dim=2)
    table = elementwise.rope_table(frequencies, 20)
    for ours, theirs in zip((q, k), expected, strict=True):
        assert torch.allclose(elementwise.rope(ours, positions, table, False), theirs[0], atol=1e-5)


def test_rows_do_not_depend_on_their_neighbours():
    x, weight = torch.randn(33, 48), torch.randn(48)
    whole = elementwise.rms_norm(x, weight, 1e-6)
    assert torch.equal(whole, torch.cat([elementwise.rms_norm(row[None], weight, 1e-6) for row in x]))


def test_a_position_outside_the_table_is_refused():
    table = elementwise.rope_table(torch.ones(4), 10)
    with pytest.raises(IndexError):
        elementwise.rope(torch.randn(1, 1, 8), torch.tensor([10], dtype=torch.int32), table, False)
