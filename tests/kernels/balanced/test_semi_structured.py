"""B = 4, k = 2 is torch's 2:4: the same compressed matrix and metadata, bit for bit, by torch's own conversion as oracle."""

from __future__ import annotations

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from kernels.balanced import BalancedFormatError, pack
from kernels.balanced.semi_structured import from_semi_structured, from_torch, to_semi_structured, to_torch
from tests.kernels.balanced.world import randn


@pytest.mark.parametrize("vector", [1, 16])
@pytest.mark.parametrize("value_type", ["bf16", "fp16", "int8"])
def test_equals_torchs_conversion_and_comes_back(value_type, vector):
    weight = pack(randn(96, 128), 2, 4, value_type=value_type, vector=vector)
    values, metadata = to_semi_structured(weight)
    stored = weight.unpack_values()
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, metadata), stored)
    if value_type != "int8":  # int8 may hold zeros, for which torch chooses other positions
        expected = sparse_semi_structured_from_dense_cutlass(stored)
        assert torch.equal(values, expected[0])
        assert torch.equal(metadata, expected[1])
    again = from_semi_structured(values, metadata, weight.scales if value_type == "int8" else None)
    assert torch.equal(again.unpack(), weight.unpack())
    assert torch.equal(again.mask(), weight.mask())
    assert again.spec.value_type == value_type


def test_zeros_that_are_kept_stay_where_they_are():
    weight = pack(torch.zeros(32, 64), 2, 4, value_type="bf16", scores=randn(32, 64))
    assert torch.equal(from_semi_structured(*to_semi_structured(weight)).mask(), weight.mask())


def test_float32_is_one_of_two():
    dense = randn(64, 64).view(64, 32, 2)
    first = randn(64, 32, 1) > 0
    dense = torch.where(torch.cat((first, ~first), dim=2), dense, 0).view(64, 64)
    values, metadata = sparse_semi_structured_from_dense_cutlass(dense)
    weight = from_semi_structured(values, metadata)
    assert torch.equal(weight.unpack(), dense)
    assert torch.equal(to_semi_structured(weight)[0], values)
    assert torch.equal(to_semi_structured(weight)[1], metadata)
    with pytest.raises(BalancedFormatError, match="bf16 or fp16"):
        to_semi_structured(pack(randn(64, 64), 2, 4))


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_torchs_tensor_is_made_and_read():
    weight = pack(randn(64, 64), 2, 4, value_type="bf16")
    tensor = to_torch(weight)
    assert type(tensor).__name__ == "SparseSemiStructuredTensorCUTLASS"
    assert torch.equal(tensor.to_dense(), weight.unpack())
    assert torch.equal(from_torch(tensor).unpack(), weight.unpack())
    with pytest.raises(BalancedFormatError, match="not a 2:4 tensor"):
        from_torch(torch.ones(4, 4))


def test_what_the_hardware_has_not_is_refused():
    for weight, sentence in [
        (pack(randn(64, 64), 3, 8, value_type="bf16"), "k = 2 of every 4"),
        (pack(randn(33, 64), 2, 4, value_type="bf16"), "rows by 32"),
        (pack(randn(32, 72), 2, 4, value_type="bf16"), "columns by 16"),
        (pack(randn(16, 48), 2, 4, value_type="int8"), "columns by 32"),
    ]:
        with pytest.raises(BalancedFormatError, match=sentence):
            to_semi_structured(weight)
    values, metadata = to_semi_structured(pack(randn(32, 64), 2, 4, value_type="bf16"))
    for broken, sentence in [
        ((values.int(), metadata), "no 2:4 tensor"),
        ((values, metadata.int()), "no 2:4 tensor"),
        ((values, metadata[:, :-1]), "does not fit"),
        ((values, torch.zeros_like(metadata)), "twice"),
    ]:
        with pytest.raises(BalancedFormatError, match=sentence):
            from_semi_structured(*broken)
