"""Balanced weights on disk: bit for bit, hardly larger than their values and index, and a clear error for a touched file."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kernels.balanced import BalancedFormatError, BalancedWeight, load, pack, save
from kernels.balanced.spec import VALUE_TYPES
from tests.kernels.balanced.world import PATTERNS, bits, randn


@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_a_file_gives_back_every_bit(tmp_path, value_type):
    weights = {
        f"{k}:{block}/{vector}/{layout}": pack(
            randn(33, 70), k, block, value_type=value_type, vector=vector, layout=layout
        )
        for k, block in PATTERNS
        for vector, layout in ((1, "rows"), (1, "lanes"), (16, "lanes"))
    }
    others = {"bias": randn(33), "empty": torch.empty(0), "view": randn(10)[3:]}
    save(tmp_path / "w.safetensors", {**weights, **others})
    for layout in (None, "rows"):
        loaded = load(tmp_path / "w.safetensors", layout=layout)
        assert set(loaded) == {*weights, *others}
        for name, weight in weights.items():
            again = loaded[name]
            assert isinstance(again, BalancedWeight)
            assert torch.equal(bits(again.unpack()), bits(weight.unpack()))
            assert torch.equal(again.mask(), weight.mask())
            assert again.spec.layout == (layout or "lanes")
        assert all(torch.equal(loaded[name], tensor) for name, tensor in others.items())


@pytest.mark.parametrize(
    ("k", "block", "value_type"),
    [(2, 4, "bf16"), (16, 32, "fp32"), (3, 32, "int8"), (2, 16, "fp16"), (25, 256, "bf16")],
)
def test_a_file_is_hardly_larger_than_its_content(tmp_path, k, block, value_type):
    weight = pack(randn(512, 512), k, block, value_type=value_type)
    save(tmp_path / "w.safetensors", {"w": weight})
    index_bits = min(block / k, 4 if block <= 16 else 8)
    value_bits = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8}[value_type]
    ideal = 512 * 512 * k / block * (value_bits + index_bits) / 8 + (4 * 512 if value_type == "int8" else 0)
    assert weight.spec.ideal_bytes == pytest.approx(ideal)
    assert (tmp_path / "w.safetensors").stat().st_size <= 1.05 * ideal


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "w.safetensors"
    save(path, {"w": pack(randn(33, 64), 3, 32), "bias": randn(33)})
    return path


def test_every_flipped_byte_is_found(file):
    whole = file.read_bytes()
    for place in [0, 9, 60, 200, 500, *range(len(whole) - 1, 800, -(len(whole) // 40))]:
        touched = bytearray(whole)
        touched[place] ^= 0x11
        file.write_bytes(touched)
        try:
            loaded = load(file)
        except BalancedFormatError as error:
            assert str(file) in str(error)
        else:  # a byte of the header that means nothing, such as a space
            file.write_bytes(whole)
            assert all(torch.equal(bits(a.values if isinstance(a, BalancedWeight) else a),
                                   bits(b.values if isinstance(b, BalancedWeight) else b))
                       for a, b in zip(loaded.values(), load(file).values(), strict=True))  # fmt: skip


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_cut_file_is_refused(file, length):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(BalancedFormatError, match=str(file)):
        load(file)


def test_a_missing_and_a_foreign_file_are_refused(tmp_path):
    with pytest.raises(BalancedFormatError, match="there is no file"):
        load(tmp_path / "none")
    save_file({"a": torch.ones(3)}, tmp_path / "foreign")
    with pytest.raises(BalancedFormatError, match="no balanced checkpoint"):
        load(tmp_path / "foreign")


def rewritten(file, change):
    """The file with its metadata's content changed by ``change(content, tensors)`` and all digests left as they were."""
    with safe_open(str(file), "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    content = json.loads(metadata["sextant_balanced"])
    change(content, tensors)
    save_file(tensors, file, {**metadata, "sextant_balanced": json.dumps(content)})


@pytest.mark.parametrize(
    "change",
    [
        lambda content, tensors: content["specs"]["w"].update(k=4),
        lambda content, tensors: content["specs"]["w"].update(columns=65),
        lambda content, tensors: content["digests"].pop("bias"),
        lambda content, tensors: content.update(version=2),
        lambda content, tensors: tensors.pop("w.index"),
        lambda content, tensors: tensors.update(more=torch.ones(1)),
        lambda content, tensors: tensors["w.index"].add_(1),
        lambda content, tensors: tensors.update({"w.values": tensors["w.values"].double()}),
    ],
)
def test_changed_metadata_and_tensors_are_refused(file, change):
    rewritten(file, change)
    with pytest.raises(BalancedFormatError, match=str(file)):
        load(file)


def test_names_that_collide_are_refused(tmp_path):
    with pytest.raises(BalancedFormatError, match=r"w\.index"):
        save(tmp_path / "w", {"w": pack(randn(8, 8), 2, 4), "w.index": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_an_index_other_than_the_smallest_is_made_small(tmp_path):
    weight = pack(randn(32, 64), 16, 32, layout="rows")
    positions = weight.positions()
    fat = BalancedWeight(
        type(weight.spec)(**{**asdict(weight.spec), "index_kind": "8-bit"}),
        weight.values,
        positions.view(32, -1),
        weight.scales,
    )
    save(tmp_path / "w", {"w": fat})
    loaded = load(tmp_path / "w", layout="rows")["w"]
    assert isinstance(loaded, BalancedWeight)
    assert loaded.spec == weight.spec
    assert torch.equal(loaded.unpack(), weight.unpack())
