"""BalancedLinear: a layer like torch's own: state dict, dtype, copies, training of the packed values."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from kernels.balanced import BalancedFormatError, BalancedLinear, pack
from tests.kernels.balanced.world import randn


def layer(trainable: bool = False, **keywords) -> tuple[nn.Linear, BalancedLinear]:
    torch.manual_seed(1)
    dense = nn.Linear(40, 33)
    return dense, BalancedLinear.from_linear(dense, 3, 8, trainable=trainable, **keywords)


def test_computes_the_masked_layer():
    dense, balanced = layer()
    with torch.no_grad():
        dense.weight.mul_(balanced.weight.mask())
    assert torch.allclose(balanced(randn(2, 40)), dense(randn(2, 40)), atol=1e-5)
    assert "3:8" in repr(balanced)


@pytest.mark.parametrize("other", [{"k": 3, "block": 8}, {"k": 4, "block": 32}, {"k": 2, "block": 4, "value_type": "int8"},
                                   {"k": 3, "block": 8, "layout": "rows"}])  # fmt: skip
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_goes_through_a_file_into_a_layer_of_another_pattern(other, assign):
    source = BalancedLinear(pack(randn(33, 40, seed=9), **other), randn(33))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = layer()[1]
    target(randn(2, 40))  # whatever it derived from its old tensors must not outlive them
    target.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert torch.equal(target.weight.unpack(), source.weight.unpack())
    assert torch.allclose(target(randn(2, 40)), source(randn(2, 40)), atol=1e-6)
    assert target.weight.values is target.values


def test_a_state_dict_of_other_features_or_with_a_broken_index_is_refused():
    target = layer()[1]
    with pytest.raises(BalancedFormatError, match="40 -> 33"):
        target.load_state_dict(BalancedLinear(pack(randn(33, 41), 3, 8), randn(33)).state_dict())
    state = copy.deepcopy(layer()[1].state_dict())
    state["index"].zero_()
    with pytest.raises(BalancedFormatError, match="outside of its block of 8"):
        target.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversion_to_another_dtype_is_a_value_type(dtype):
    balanced = layer()[1]
    before = balanced.weight.unpack()
    balanced.to(dtype)
    assert balanced.weight.spec.value_type == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    assert torch.equal(balanced.weight.unpack(), before.to(dtype))
    assert balanced(randn(2, 40).to(dtype)).dtype == dtype
    with pytest.raises(BalancedFormatError, match="float64"):
        balanced.double()


def test_a_copy_is_independent():
    balanced = layer()[1]
    twin = copy.deepcopy(balanced)
    assert twin.weight.values is twin.values
    twin.values.zero_()
    assert balanced.weight.unpack().any()
    assert not (twin(randn(1, 40)) - twin.bias).any()


def test_training_moves_the_values_and_never_the_choice():
    dense, balanced = layer(trainable=True)
    mask = balanced.weight.mask()
    optimiser = torch.optim.SGD(balanced.parameters(), lr=0.1)
    twin = nn.Parameter(dense.weight.detach() * mask)
    twin_bias = nn.Parameter(dense.bias.detach().clone())
    twin_optimiser = torch.optim.SGD([twin, twin_bias], lr=0.1)
    for step in range(3):
        x = randn(16, 40, seed=step)
        for made, chosen in (
            (balanced(x), optimiser),
            (nn.functional.linear(x, twin * mask, twin_bias), twin_optimiser),
        ):
            chosen.zero_grad()
            made.square().mean().backward()
            chosen.step()
    assert torch.equal(balanced.weight.mask(), mask)
    assert torch.allclose(balanced.weight.unpack(), twin.detach() * mask, atol=1e-5)
    assert torch.allclose(balanced.bias, twin_bias, atol=1e-5)


def test_what_cannot_be_trained_or_added_is_refused():
    with pytest.raises(BalancedFormatError, match="int8 values cannot be trained"):
        layer(trainable=True, value_type="int8")
    with pytest.raises(BalancedFormatError, match="bias must be"):
        BalancedLinear(pack(randn(33, 40), 3, 8), randn(32))
