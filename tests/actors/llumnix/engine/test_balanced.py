"""Balanced checkpoints in the engine: the dense model's numbers, the same bits in any batch, broken folders refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from actors.llumnix.engine import model_cpp
from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.loading import ModelLoadError, build_model, open_weights, read_model_config
from actors.llumnix.engine.model_config import ModelConfig, RopeConfig
from actors.llumnix.engine.weights import balanced
from actors.llumnix.engine.weights.source import LAYER_MATRICES, expected_shapes
from kernels.balanced import BalancedWeight, pack
from kernels.decoder import reference
from tests.actors.llumnix.engine.model_tools import blocks_for, make_batch

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    "LlamaForCausalLM", 96, 160, 3, 6, 2, 16, 120, 256, 1e-5,
    RopeConfig(interleaved=True, freq_factors=(1.0,) * 8), tie_word_embeddings=True, qkv_bias=True, qk_norm=True,
    eos_token_ids=(1, 2), bos_token_id=0,
)  # fmt: skip
needs_cpp = pytest.mark.skipif(not model_cpp.available(), reason="no compiler")
TOKENS = torch.randint(0, 120, (47,), generator=torch.Generator().manual_seed(4)).tolist()


class Dense:
    """The same weights, dense."""

    path, config, fingerprint = None, CONFIG, "0" * 64

    def __init__(self, tensors):
        self.tensors = tensors

    def tensor(self, name):
        item = self.tensors[name]
        return item.unpack() if isinstance(item, BalancedWeight) else item


def weights(value_type="fp32", k=4, block=16, vector=1, dense_layers=(1,)):
    """Layers of ``dense_layers`` are not balanced, as where pruning was told to skip them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in expected_shapes(CONFIG).items():
        tensor = torch.randn(shape, generator=generator) * (2 / shape[-1] ** 0.5) + (0.8 if "norm" in name else 0)
        parts = name.split(".")
        if parts[-1] in LAYER_MATRICES and int(parts[1]) not in dense_layers:
            tensor = pack(tensor, k, block, value_type=value_type, vector=vector)
        tensors[name] = tensor
    return tensors


def opened(folder, **options):
    tensors = weights(**options)
    balanced.save(folder, CONFIG, tensors)
    return open_weights(str(folder)), tensors


def config_for(source, **options):
    return EngineConfig(str(source.path), **{"dtype": "fp32", "device": "cpu", "max_model_len": 256} | options)


def logits_of(model, tokens=TOKENS):
    batch = make_batch([(tokens, 0, blocks_for(len(tokens)))], all_rows=True)
    return model.forward(batch, model.new_kv(8))


def test_configuration_and_weights_survive_the_disk(tmp_path):
    source, tensors = opened(tmp_path)
    assert source.config == CONFIG
    assert read_model_config(str(tmp_path)) == CONFIG
    for name in tensors:
        assert torch.equal(source.tensor(name), Dense(tensors).tensor(name))
    assert source.fingerprint == open_weights(str(tmp_path)).fingerprint


@pytest.mark.parametrize("vector", [1, 4])
@pytest.mark.parametrize("value_type", ["fp32", "bf16", "fp16", "int8"])
def test_matrices_are_joined_bit_for_bit(tmp_path, value_type, vector):
    source, _ = opened(tmp_path, value_type=value_type, vector=vector)
    names = [f"layers.0.{name}" for name in ("q", "k", "v")]
    joined = source.joined(names)
    assert joined.spec.layout == "lanes"
    assert torch.equal(joined.unpack(), torch.cat([source.tensor(name) for name in names]))
    assert source.joined(["layers.1.q"]) is None
    assert source.joined(["layers.0.q", "layers.1.q"]) is None


@needs_cpp
@pytest.mark.parametrize("value_type", ["fp32", "bf16", "fp16", "int8"])
def test_the_compiled_path_computes_the_dense_models_numbers(tmp_path, value_type):
    source, tensors = opened(tmp_path, value_type=value_type)
    model = build_model(source, config_for(source, kernels="cpp"), CPU)
    dense = build_model(Dense(tensors), config_for(source, kernels="cpp"), CPU)
    torch.testing.assert_close(logits_of(model), logits_of(dense), rtol=1e-4, atol=1e-4)
    assert model.weight_bytes < 0.75 * dense.weight_bytes
    assert model.numerics != dense.numerics
    assert "balanced" in model.numerics


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_both_paths_agree_whatever_the_dense_matrices_are(tmp_path, dtype):
    source, _ = opened(tmp_path, value_type="fp32")
    torch_path = build_model(source, config_for(source, kernels="torch", dtype=dtype), CPU)
    assert torch_path.path == "torch"
    if not model_cpp.available():
        pytest.skip("no compiler")
    cpp = build_model(source, config_for(source, kernels="cpp", dtype=dtype), CPU)
    tolerance = {"fp32": 1e-4, "bf16": 0.03, "int8": 0.06}[dtype]  # the torch path rounds all matrices to dtype
    expected = logits_of(torch_path)
    assert (logits_of(cpp) - expected).norm() < tolerance * expected.norm()


@needs_cpp
@pytest.mark.parametrize("isa", [0, 1, 2])
@pytest.mark.parametrize(("k", "block"), [(4, 16), (6, 32), (20, 64), (24, 96), (50, 200)])
@pytest.mark.parametrize("value_type", ["bf16", "int8"])
def test_the_compiled_stack_is_the_composed_one_bit_for_bit(tmp_path, value_type, k, block, isa):
    """Every kind of index on every instruction set that this machine has."""
    source, _ = opened(tmp_path, value_type=value_type, k=k, block=block)
    before = torch.ops.sextant.balanced_set_isa(-1)
    model = build_model(source, config_for(source, kernels="cpp"), CPU)
    try:
        torch.ops.sextant.balanced_set_isa(isa)
        batch = make_batch([(TOKENS[:20], 0, [1, 2]), (TOKENS[20:21], 0, [3]), (TOKENS[21:], 0, [5, 4])], all_rows=True)
        decoder = model._decoder._decoder
        arguments = [
            *(batch.token_ids_T, batch.positions_T, batch.query_start, batch.context_len_S),
            *(batch.block_table_SN, batch.logits_rows_R),
        ]
        kv, kv_reference = model.new_kv(8), model.new_kv(8)
        got = decoder.forward(kv, *arguments)
        expected = reference.forward(decoder, kv_reference, *arguments)
    finally:
        torch.ops.sextant.balanced_set_isa(before)
    assert torch.equal(got, expected)
    assert torch.equal(kv, kv_reference)


@needs_cpp
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("value_type", ["fp32", "bf16", "int8"])
def test_same_bits_alone_in_a_batch_and_in_chunks(tmp_path, value_type, threads):
    source, _ = opened(tmp_path, value_type=value_type, k=6, block=32)
    model = build_model(source, config_for(source, kernels="cpp", dtype="bf16"), CPU)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = logits_of(model)
    try:
        torch.set_num_threads(threads)
        others = [(TOKENS[i : i + n], 0, blocks_for(n, 8 + 2 * i)) for i, n in enumerate((5, 1, 17))]
        batch = make_batch([others[0], (TOKENS, 0, blocks_for(47)), *others[1:]], all_rows=True)
        assert torch.equal(model.forward(batch, model.new_kv(16))[5 : 5 + 47], alone)
        kv, rows = model.new_kv(16), []
        for start, end in ((0, 7), (7, 9), (9, 30), *((i, i + 1) for i in range(30, 47))):  # down to decode steps
            rows.append(
                model.forward(make_batch([(TOKENS[start:end], start, blocks_for(47, 15, -2))], all_rows=True), kv)
            )
        assert torch.equal(torch.cat(rows), alone)
    finally:
        torch.set_num_threads(before)


def test_int8_is_not_equalised(tmp_path):
    """The norms must stay those that the packed matrices were made for."""
    source, tensors = opened(tmp_path, value_type="fp32", dense_layers=())
    model = build_model(source, config_for(source, dtype="int8"), CPU)
    expected = logits_of(build_model(Dense(tensors), config_for(source), CPU))
    assert (logits_of(model) - expected).norm() < 0.06 * expected.norm()


def broken(change):
    def test(folder):
        content = json.loads((folder / balanced.CONFIG_FILE).read_text())
        change(content)
        (folder / balanced.CONFIG_FILE).write_text(json.dumps(content))

    return test


def flip(folder):
    path = folder / balanced.WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (flip, "not those that were written"),
        (lambda folder: (folder / balanced.WEIGHTS_FILE).unlink(), "no file"),
        (broken(lambda c: c.update(version=9)), "version 9"),
        (broken(lambda c: c["config"].update(num_layers=4)), "lacks the tensor layers.3"),
        (broken(lambda c: c["config"].update(intermediate_size=128)), "promises"),
        (broken(lambda c: c["config"].pop("vocab_size")), "does not describe a decoder"),
        (broken(lambda c: c["config"].update(num_kv_heads=4)), "do not share"),
        (broken(lambda c: c.pop("config")), "does not describe"),
    ],
)
def test_a_broken_folder_is_one_sentence(tmp_path, breaks, says):
    opened(tmp_path)
    breaks(tmp_path)
    with pytest.raises(ModelLoadError, match=says):
        open_weights(str(tmp_path))


def test_weights_of_another_model_are_not_saved(tmp_path):
    tensors = weights()
    with pytest.raises(ValueError, match="not the weights of this model"):
        balanced.save(tmp_path, replace(CONFIG, num_layers=2), tensors)
    with pytest.raises(ValueError, match="promises"):
        balanced.save(tmp_path, replace(CONFIG, intermediate_size=128), tensors)
