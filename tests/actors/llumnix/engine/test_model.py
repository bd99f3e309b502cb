"""The pool's geometry, and which path runs where."""

from __future__ import annotations

import logging

import pytest
import torch

from actors.llumnix.engine import model_cpp
from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.loading import ModelLoadError, build_model
from actors.llumnix.engine.model import TorchRunner
from actors.llumnix.engine.model_torch import TorchDecoder
from actors.llumnix.engine.weights.equalise import EqualisedSource
from actors.llumnix.engine.weights.huggingface import HuggingFaceSource
from tests.actors.llumnix.engine.model_tools import blocks_for, make_batch
from tests.actors.llumnix.engine.test_huggingface import config_for, save

pytest.importorskip("transformers")
CPU = torch.device("cpu")


@pytest.fixture
def source(tmp_path):
    save(tmp_path, "Llama", {})
    return HuggingFaceSource(tmp_path)


@pytest.mark.parametrize(("kv_dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_pool_geometry(source, kv_dtype, size):
    model = build_model(source, config_for(source.path, kv_dtype=kv_dtype, kernels="torch"), CPU)
    # 2 layers x (K and V) x 2 KV heads x 16 dimensions x 16 positions
    assert model.kv_bytes_per_block(16) == 2 * 2 * 2 * 16 * 16 * size
    kv = model.new_kv(3)
    assert kv.shape == (3, 2, 2, 2, 256)
    assert kv.nbytes == 3 * model.kv_bytes_per_block()
    buffer = torch.full((kv.nbytes + 5,), 255, dtype=torch.uint8)
    placed = model.new_kv(3, buffer)
    assert placed.data_ptr() == buffer.data_ptr()
    assert not placed.any()
    with pytest.raises(ValueError, match="needs a buffer"):
        model.new_kv(4, buffer)
    with pytest.raises(ValueError, match="needs a buffer"):
        model.new_kv(1, buffer.float())
    with pytest.raises(ValueError, match="not even one block"):
        model.new_kv(0)


def test_smollm2_block_is_737_280_bytes(smollm2_gguf):
    from actors.llumnix.engine.loading import read_model_config
    from actors.llumnix.engine.model import Model

    config = read_model_config(str(smollm2_gguf))
    model = Model(config, None, "torch", "fp32", "fp32", CPU, "")  # type: ignore[arg-type]
    assert model.kv_bytes_per_block() == 737_280
    assert config.num_parameters == 134_515_008  # As the hub's page of SmolLM2-135M says, 135M.


def test_without_a_compiler_torch_runs_and_says_so(source, monkeypatch, caplog):
    monkeypatch.setattr(model_cpp, "available", lambda: False)
    with caplog.at_level(logging.WARNING):
        model = build_model(source, config_for(source.path), CPU)
    assert model.path == "torch"
    assert "slower and not bit-exact" in caplog.text
    with pytest.raises(ModelLoadError, match=r"kernels=cpp cannot run.*compiler"):
        build_model(source, config_for(source.path, kernels="cpp"), CPU)


def test_unusual_parts_run_on_torch(tmp_path):
    save(tmp_path, "Llama", {"attention_bias": True})
    with pytest.raises(ModelLoadError, match="no bias on the attention's output"):
        build_model(HuggingFaceSource(tmp_path), config_for(tmp_path, kernels="cpp"), CPU)
    assert build_model(HuggingFaceSource(tmp_path), config_for(tmp_path), CPU).path == "torch"


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_both_cpu_paths_agree(source, dtype, kv_dtype):
    """The torch path is the compiled one's independent twin: same definition of each number type, other code."""
    if not model_cpp.available():
        pytest.skip("no compiler")
    tokens = list(range(3, 50))
    logits = {}
    for kernels in ("cpp", "torch"):
        model = build_model(source, config_for(source.path, dtype=dtype, kv_dtype=kv_dtype, kernels=kernels), CPU)
        kv = model.new_kv(5)
        table = blocks_for(47, 4, -1)
        model.forward(make_batch([(tokens[:40], 0, table)]), kv)
        logits[kernels] = model.forward(make_batch([(tokens[40:], 40, table)], all_rows=True), kv)
    # int8 and bf16 round activations: a last-bit difference may become a step of that rounding.
    tolerance = {"fp32": 1e-4, "bf16": 0.03, "int8": 0.05}[dtype] + (0.01 if kv_dtype == "bf16" else 0)
    difference = (logits["cpp"] - logits["torch"]).norm() / logits["torch"].norm()
    assert difference < tolerance


def test_numerics_of_equal_settings_are_equal(source):
    first, second = (build_model(source, config_for(source.path), CPU) for _ in range(2))
    assert first.numerics == second.numerics
    assert EngineConfig().dtype in build_model(source, config_for(source.path, dtype="bf16"), CPU).numerics


def test_equalised_weights_compute_the_same_and_quantise_better(tmp_path):
    """A norm with outlier channels: the fp32 model keeps its bits, the int8 one comes nearer to it."""
    model = save(tmp_path, "Llama", {})
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:3] *= 60
            layer.input_layernorm.weight[5] = 0  # No channel to balance: it must stay as it is.
            for matrix in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                matrix.weight[:, :3] /= 60
    model.save_pretrained(tmp_path)
    source = HuggingFaceSource(tmp_path)
    tokens = list(range(3, 50))

    def logits(weights, dtype):
        decoder = TorchDecoder(source.config, weights, dtype, CPU, 64)
        kv = torch.zeros(4, 2, 2, 2, 256)
        return TorchRunner(decoder).run(make_batch([(tokens, 0, blocks_for(47))], all_rows=True), kv)

    exact = logits(source, "fp32")
    # A power of two moves through a product unrounded.
    assert torch.equal(logits(EqualisedSource(source), "fp32"), exact)
    plain, equalised = ((logits(w, "int8") - exact).norm() for w in (source, EqualisedSource(source)))
    assert equalised < 0.8 * plain
