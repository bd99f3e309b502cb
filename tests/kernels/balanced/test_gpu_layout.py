"""The ``warps`` layout of the GPU kernels: every bit there and back, its addresses by hand, and a tampered index refused."""

from __future__ import annotations

import pytest
import torch

from kernels.balanced import BalancedFormatError, BalancedSpec, load, pack, save
from kernels.balanced.format import layout_of
from kernels.balanced.spec import VALUE_TYPES
from tests.kernels.balanced.world import PATTERNS, SHAPES, bits, randn


@pytest.mark.parametrize("vector", [1, 16])
@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_there_and_back_is_bit_exact(value_type, vector):
    for k, block in PATTERNS:
        for rows, columns in SHAPES:
            canonical = pack(randn(rows, columns), k, block, value_type=value_type, vector=vector, layout="rows")
            packed = canonical.to_layout("warps")
            for back in (packed.to_layout("rows"), packed.to_layout("lanes").to_layout("warps").to_layout("rows")):
                for name, tensor in canonical.tensors().items():
                    assert torch.equal(bits(back.tensors()[name]), bits(tensor))
            assert torch.equal(bits(packed.unpack()), bits(canonical.unpack()))
            assert torch.equal(packed.mask(), canonical.mask())
            assert packed.nbytes == packed.spec.nbytes


def test_an_entry_lies_where_the_kernels_look_for_it():
    rows, columns, k, block = 70, 96, 3, 16
    dense = randn(rows, columns)
    packed = pack(dense, k, block, value_type="fp16", layout="warps")
    values, index = packed.values.flatten(), packed.index.flatten()
    steps, chunk = packed.spec.steps, 8
    for row in (0, 31, 32, 69):
        kept = packed.mask()[row].nonzero()[:, 0].tolist()  # ascending, so entry by entry
        for entry, column in enumerate(kept):
            place = ((row // 32 * steps + entry // chunk) * 32 + row % 32) * chunk + entry % chunk
            assert values[place] == dense[row, column].half()
            nibble = index[place // 2] >> (entry % 2 * 4) & 15
            assert entry // k * block + nibble == column


def test_a_chunk_of_values_fills_sixteen_bytes_and_rows_that_share_a_choice_its_index():
    for value_type, chunk in (("fp32", 4), ("bf16", 8), ("fp16", 8), ("int8", 16)):
        packed = pack(randn(64, 128), 4, 32, value_type=value_type, vector=16, layout="warps")
        assert packed.values.shape == (2, 16 // chunk, 32, chunk)
        assert packed.index.shape == (1, 16 // chunk, 32, chunk)


def test_bytes_at_the_shapes_that_matter_are_the_format_s_own():
    spec = BalancedSpec(8192, 8192, 4, 16, "fp16", layout="rows").with_smallest_index("warps")
    assert spec.nbytes == spec.ideal_bytes  # no byte of padding


def test_gradients_of_packed_values_are_gathered_into_the_layout():
    dense, packed = randn(70, 90), pack(randn(70, 90), 3, 16, layout="warps")
    gathered = packed.with_tensors({**packed.tensors(), "values": packed.gather(dense)})
    assert torch.equal(gathered.unpack(), dense * packed.mask())


@pytest.mark.parametrize(("k", "block"), [(3, 16), (3, 32)])
@pytest.mark.parametrize("where", ["twice", "outside", "behind the last entry", "behind the last row"])
def test_a_tampered_index_is_refused(k, block, where):
    packed = pack(randn(40, 5 * block), k, block, layout="warps")  # 15 entries in chunks of 4
    index = packed.index.clone()
    if where == "twice":
        index[0, 0, 0] = 0
    elif where == "outside":
        if block == 16:
            pytest.skip("four bits name no column outside")
        index[0, 0, 0, 0] = 32
    elif where == "behind the last entry":
        index[0, -1, 0, -1] = 0x7F
    else:
        index[1, 0, 20, 0] = 1
    with pytest.raises(BalancedFormatError, match="index"):
        packed.with_tensors({**packed.tensors(), "index": index}).validate()


def test_a_file_holds_it_in_the_canonical_layout(tmp_path):
    packed = pack(randn(70, 90), 3, 16, value_type="int8", layout="warps")
    save(tmp_path / "w.safetensors", {"w": packed})
    for layout, expected in (("warps", packed), ("rows", packed.to_layout("rows"))):
        again = load(tmp_path / "w.safetensors", layout=layout)["w"]
        for name, tensor in expected.tensors().items():
            assert torch.equal(bits(again.tensors()[name]), bits(tensor))


def test_bitmaps_are_no_index_of_this_layout():
    with pytest.raises(BalancedFormatError, match="warps"):
        BalancedSpec(8, 8, 2, 4, index_kind="bitmap", layout="warps")


def test_a_device_has_the_layout_of_its_kernels():
    assert [layout_of(device) for device in ("cpu", "cuda:1", "meta")] == ["lanes", "warps", "rows"]
