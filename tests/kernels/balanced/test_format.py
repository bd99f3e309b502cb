"""kernels.balanced's format: exactly k in every block, whatever the floats; packed and unpacked to the bit in every layout."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.balanced import BalancedFormatError, BalancedSpec, format, lanes, pack, selection
from kernels.balanced.index_codec import decode, encode
from kernels.balanced.spec import TORCH_DTYPES, VALUE_TYPES
from tests.kernels.balanced.world import PATTERNS, SHAPES, bits, needs_cpp, randn


def kept_by_hand(row: np.ndarray, k: int, block: int) -> np.ndarray:
    """Independent of torch: sort by (NaN first, greater magnitude, lower column)."""
    mask = np.zeros(len(row), dtype=bool)
    for start in range(0, len(row), block):
        part = row[start : start + block]
        order = sorted(
            range(len(part)), key=lambda i: (not math.isnan(part[i]), -abs(part[i]) if part[i] == part[i] else 0, i)
        )
        mask[[start + i for i in order[:k]]] = True
    return mask


floats = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, math.nan, 1e-45, -3.5])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_exactly_k_are_kept_for_ties_zeros_nan_and_infinities(data):
    block = data.draw(st.integers(4, 40))
    k = data.draw(st.integers(1, block))
    columns = data.draw(st.integers(1, 90))
    rows = [data.draw(st.lists(floats, min_size=columns, max_size=columns)) for _ in range(2)]
    weight = torch.tensor(rows)
    mask = pack(weight, k, block).mask()
    assert np.array_equal(mask.numpy(), np.stack([kept_by_hand(row, k, block) for row in weight.numpy()]))
    whole = mask[:, : columns // block * block].view(2, -1, block).sum(dim=2)
    assert bool((whole == k).all())


@needs_cpp
@pytest.mark.parametrize(("k", "block"), [(1, 4), (3, 5), (7, 33), (100, 256), (256, 256), (1, 1)])
def test_the_compiled_selection_is_the_reference(k, block):
    scores = randn(7, 3 * block + 1)
    scores[scores.abs() < 0.5] = 0.25
    scores[0, ::3], scores[1, ::2], scores[2] = math.nan, -math.inf, -0.0
    assert torch.equal(selection.select(scores, k, block), selection.select_reference(scores, k, block))


@pytest.mark.parametrize("value_type", VALUE_TYPES)
@pytest.mark.parametrize("vector", [1, 3, 16])
@pytest.mark.parametrize(("k", "block"), PATTERNS)
def test_all_layouts_hold_the_same_bits(k, block, vector, value_type):
    for shape in SHAPES:
        weight = randn(*shape)
        rows = pack(weight, k, block, value_type=value_type, vector=vector, layout="rows")
        lanes_ = pack(weight, k, block, value_type=value_type, vector=vector, layout="lanes")
        there_and_back = lanes_.to_layout("rows")
        assert there_and_back.spec == rows.spec
        for name, tensor in rows.tensors().items():
            assert torch.equal(bits(there_and_back.tensors()[name]), bits(tensor))
        assert torch.equal(bits(rows.to_layout("lanes").index), bits(lanes_.index))
        assert torch.equal(rows.mask(), lanes_.mask())
        assert torch.equal(bits(rows.unpack()), bits(lanes_.unpack()))
        assert rows.nbytes == rows.spec.nbytes
        if value_type != "int8":
            kept = torch.where(rows.mask(), weight, 0).to(TORCH_DTYPES[value_type])
            assert torch.equal(bits(rows.unpack()), bits(kept))


@needs_cpp
@pytest.mark.parametrize("vector", [1, 5])
@pytest.mark.parametrize(("k", "block"), PATTERNS)
def test_the_compiled_layout_is_the_reference(k, block, vector):
    rows = pack(randn(37, 70), k, block, vector=vector, layout="rows")
    spec = rows.spec.with_smallest_index("lanes")
    expected = lanes.from_rows_reference(rows.values, rows.positions(), spec)
    made = lanes.from_rows(rows.values, rows.positions(), spec)
    assert torch.equal(made[0], expected[0])
    assert torch.equal(made[1], expected[1])


def test_nan_infinity_and_negative_zero_survive_to_the_bit():
    weight = torch.tensor([[math.nan, -math.inf, -0.0, 0.0, math.inf, 1.0, -0.0, 2.0]])
    weight.view(torch.int32)[0, 0] = 0x7FC12345  # a NaN with a payload
    for layout in ("rows", "lanes"):
        assert torch.equal(bits(pack(weight, 4, 4, layout=layout).unpack()), bits(weight))


def test_int8_is_within_half_a_step_of_the_weight_and_exact_at_the_top():
    weight = randn(20, 64)
    packed = pack(weight, 8, 32, value_type="int8")
    kept = torch.where(packed.mask(), weight, 0)
    step = kept.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((packed.unpack() - kept).abs() <= step * 0.5001).all())
    assert torch.allclose(packed.unpack().abs().amax(dim=1), kept.abs().amax(dim=1), rtol=1e-6)
    assert not pack(torch.zeros(4, 8), 2, 4, value_type="int8").unpack().any()
    tiny = pack(torch.full((1, 4), 1e-45), 2, 4, value_type="int8").unpack()
    assert bool(tiny.isfinite().all())


def test_rows_of_a_vector_share_the_columns_with_the_greatest_sum():
    weight = torch.zeros(4, 4)
    weight[0], weight[1] = torch.tensor([3.0, 0, 2.0, 0]), torch.tensor([0, -2.5, -2.0, 0])
    assert pack(weight, 1, 4, vector=2).mask()[:2].int().tolist() == [[0, 0, 1, 0]] * 2  # sums 3, 2.5, 4, 0


@pytest.mark.parametrize(
    ("k", "block", "rows_kind", "lanes_kind"),
    [
        (2, 4, "bitmap", "bitmap"),  # two bits an entry
        (16, 32, "bitmap", "bitmap"),
        (8, 32, "bitmap", "bitmap"),
        (3, 32, "8-bit", "8-bit"),
        (2, 16, "4-bit", "4-bit"),
        (32, 64, "bitmap", "8-bit"),  # a register of bitmaps describes 32 columns
        (25, 256, "8-bit", "8-bit"),
    ],
)
def test_the_index_is_the_smallest(k, block, rows_kind, lanes_kind):
    weight = randn(64, 256)
    assert pack(weight, k, block, layout="rows").spec.index_kind == rows_kind
    assert pack(weight, k, block, layout="lanes").spec.index_kind == lanes_kind


@pytest.mark.parametrize("kind", ["bitmap", "4-bit", "8-bit"])
def test_every_index_kind_round_trips(kind):
    spec = BalancedSpec(5, 45, 3, 15, index_kind=kind)
    positions = selection.select(randn(5, 45), 3, 15)
    index = encode(positions, spec)
    assert tuple(index.shape) == spec.index_shape
    assert torch.equal(decode(index, spec), positions)


def one_bit(index: torch.Tensor) -> torch.Tensor:
    index.view(torch.uint8).view(-1)[0] ^= 1
    return index


@pytest.mark.parametrize("layout", ["rows", "lanes"])
@pytest.mark.parametrize(
    ("k", "block", "breaks"),
    [
        (16, 32, one_bit),  # a bitmap with one entry more or less
        (2, 16, torch.zero_),  # a column twice
        (3, 32, torch.zero_),
        (3, 32, lambda index: index.fill_(255)),  # a column outside of the block
        (2, 12, lambda index: index.fill_(0xDC)),
    ],
)
def test_an_index_that_breaks_the_balance_is_found(k, block, breaks, layout):
    packed = pack(randn(20, 70), k, block, layout=layout)
    packed.validate()
    broken = packed.with_tensors({**packed.tensors(), "index": breaks(packed.index.clone())})
    with pytest.raises(BalancedFormatError, match="exactly|ascend|of its block|of a block"):
        broken.validate()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"k": 0}, "k must be a positive integer"),
        ({"k": 17}, "do not fit"),
        ({"block": 3, "k": 1}, "4 to 256"),
        ({"block": 257}, "4 to 256"),
        ({"rows": 0}, "rows must be"),
        ({"vector": -1}, "vector must be"),
        ({"value_type": "fp8"}, "value_type must be one of"),
        ({"index_kind": "4-bit", "block": 32}, "4-bit index names one of 16"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(change, sentence):
    with pytest.raises(BalancedFormatError, match=sentence):
        replace(BalancedSpec(16, 64, 4, 16), **change)


def test_what_cannot_be_packed_is_refused_with_a_reason():
    weight = randn(8, 16)
    mask = pack(weight, 2, 4).mask()
    for arguments, sentence in [
        ({"weight": weight[0]}, "float matrix"),
        ({"weight": weight.int()}, "float matrix"),
        ({"weight": weight, "scores": weight[:2]}, "scores must be"),
        ({"weight": weight, "scores": weight, "mask": mask}, "not both"),
        ({"weight": weight, "mask": mask.int()}, "must be bool"),
        ({"weight": weight, "mask": torch.ones_like(mask)}, "exactly 2 of every 4"),
        ({"weight": weight, "mask": mask, "vector": 2}, "share their choice"),
        ({"weight": weight, "lossless": True}, "would be dropped"),
        ({"weight": weight * math.inf, "value_type": "int8"}, "finite"),
        ({"weight": weight * 1e6, "value_type": "fp16"}, "do not fit into fp16"),
        ({"weight": weight.double() * 1e300}, "do not fit into fp32"),
    ]:
        with pytest.raises(BalancedFormatError, match=sentence):
            pack(**{"k": 2, "block": 4, **arguments})


def test_a_mask_and_scores_decide_and_lossless_accepts_what_is_sparse():
    weight = randn(8, 18)
    mask = pack(weight.abs().reciprocal(), 2, 4).mask()  # not what magnitude would choose
    assert torch.equal(pack(weight, 2, 4, mask=mask).mask(), mask)
    assert torch.equal(pack(weight, 2, 4, scores=weight.abs().reciprocal()).mask(), mask)
    assert torch.equal(pack(weight * mask, 2, 4, lossless=True).unpack(), weight * mask)


def test_packing_its_own_result_changes_nothing():
    once = pack(randn(24, 50), 3, 8).unpack()
    assert torch.equal(pack(once, 3, 8, lossless=True).unpack(), once)


def test_non_contiguous_double_and_inference_weights_are_packed():
    wide = randn(30, 40)
    expected = pack(wide.t().contiguous(), 3, 8).unpack()
    assert torch.equal(pack(wide.t(), 3, 8).unpack(), expected)
    assert torch.equal(pack(wide.t().double(), 3, 8).unpack(), expected)
    with torch.inference_mode():
        packed = pack(wide.t() * 1.0, 3, 8)
    assert torch.equal(packed.unpack(), expected)
    assert not packed.values.is_inference()


def test_copies_are_equal_and_their_own():
    packed = pack(randn(20, 40), 3, 8)
    for made in (packed.clone(), copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert made.spec == packed.spec
        assert torch.equal(made.unpack(), packed.unpack())
        assert made.values.data_ptr() != packed.values.data_ptr()


def test_tensors_that_do_not_fit_the_spec_are_refused():
    packed = pack(randn(20, 40), 3, 8)
    for name, tensor in packed.tensors().items():
        for broken in (tensor[:-1] if tensor.numel() else torch.ones(1), tensor.double()):
            with pytest.raises(BalancedFormatError, match=name):
                packed.with_tensors({**packed.tensors(), name: broken})


@pytest.mark.parametrize("vector", [1, 3])
@pytest.mark.parametrize("layout", ["rows", "lanes"])
def test_gather_takes_the_kept_entries(layout, vector):
    packed = pack(randn(21, 37), 3, 8, vector=vector, layout=layout)
    other = randn(21, 37, seed=5)
    gathered = packed.with_tensors({**packed.tensors(), "values": packed.gather(other)})
    assert torch.equal(gathered.unpack(), other * packed.mask())


def test_the_torch_path_packs_the_same(monkeypatch):
    expected = {layout: pack(randn(37, 75), 5, 12, layout=layout) for layout in ("rows", "lanes")}
    for module in (format, lanes, selection):
        monkeypatch.setattr(module, "cpp", lambda: False)
    for layout, weight in expected.items():
        packed = pack(randn(37, 75), 5, 12, layout=layout)
        assert torch.equal(bits(packed.values), bits(weight.values))
        assert torch.equal(packed.index, weight.index)
        assert torch.equal(packed.unpack(), weight.unpack())
