"""From a dense language model to a served sparse one: exact pattern, recovery recovers, the engine computes the pruned model."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from actors.llumnix.engine import model_cpp
from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.loading import build_model, open_weights
from actors.llumnix.engine.model_config import ModelConfig, RopeConfig
from actors.llumnix.engine.weights import balanced
from apps.balanced_sparsity.pruning.patterns import Pattern
from apps.balanced_sparsity.serving.checkpoint import save_checkpoint
from apps.balanced_sparsity.serving.llama import Llama
from apps.balanced_sparsity.serving.sparsify import Recovery, sparsify_
from tests.actors.llumnix.engine.model_tools import blocks_for, make_batch

CONFIGS = {
    "plain": ModelConfig("LlamaForCausalLM", 64, 96, 2, 4, 2, 16, 50, 256, 1e-5, RopeConfig(interleaved=True), True),
    "all parts": ModelConfig(
        "Qwen3ForCausalLM", 64, 96, 2, 4, 2, 16, 50, 256, 1e-5, RopeConfig(theta=5e5), qkv_bias=True, qk_norm=True
    ),
}  # fmt: skip
CPU = torch.device("cpu")


def model_of(config, seed=0):
    torch.manual_seed(seed)
    model = Llama(config, 128)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if "norm" in name else 2 / parameter.shape[-1] ** 0.5
            parameter.copy_(torch.randn_like(parameter) * scale + (1 if "norm" in name else 0))
    return model.eval().requires_grad_(False)


def text(sequences=12, tokens=48, seed=1):
    return torch.randint(0, 50, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


def engine_logits(folder, tokens, **options):
    source = open_weights(str(folder))
    model = build_model(source, EngineConfig(str(folder), **{"dtype": "fp32", "device": "cpu"} | options), CPU)
    batch = make_batch([(tokens.tolist(), 0, blocks_for(len(tokens)))], all_rows=True)
    return model.forward(batch, model.new_kv(8))


def divergence(model, teacher, tokens):
    with torch.no_grad():
        p, q = teacher(tokens).log_softmax(-1), model(tokens).log_softmax(-1)
    return float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("case", CONFIGS)
def test_the_training_model_is_the_engines_model(tmp_path, case):
    model = model_of(CONFIGS[case])
    save_checkpoint(tmp_path, model, {}, 16, other_type=torch.float32)
    again = Llama.from_source(open_weights(str(tmp_path)))
    tokens = text()[0]
    with torch.no_grad():
        expected = model(tokens[None])[0]
        assert torch.equal(again(tokens[None])[0], expected)
    torch.testing.assert_close(engine_logits(tmp_path, tokens, kernels="torch"), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="more than the"):
        model(torch.zeros(1, 129, dtype=torch.int64))


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("value_type", ["fp32", "bf16", "int8"])
def test_the_engine_computes_the_pruned_model(tmp_path, case, value_type):
    model = model_of(CONFIGS[case])
    out = sparsify_(model, text(4), Pattern.balanced(16), 0.75, recovery=Recovery(steps=0), skip_layers=(1,))
    assert set(out.masks) == {f"layers.0.{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    for name, mask in out.masks.items():
        weight = model.get_submodule(name).weight
        assert not weight[~mask].any()
        assert (mask.view(len(mask), -1, 16).sum(2) == 4).all()
    size = save_checkpoint(tmp_path, model, out.masks, 16, value_type=value_type, other_type=torch.float32)
    tokens = text()[0]
    with torch.no_grad():
        expected = model(tokens[None])[0]
    tolerance = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.04}[value_type]
    for kernels in ("cpp", "torch") if model_cpp.available() else ("torch",):
        got = engine_logits(tmp_path, tokens, kernels=kernels)
        assert (got - expected).norm() < tolerance * expected.norm()
    assert size.matrix_bytes <= 1.02 * size.ideal_bytes
    assert size.matrix_bytes < 0.52 * size.dense_bytes
    assert size.file_bytes >= size.matrix_bytes + size.other_bytes


def test_reconstruction_and_distillation_each_bring_it_nearer():
    """On text that neither saw: drawn from the same (random) model, so that there is something to be recovered."""
    config = CONFIGS["plain"]
    teacher = model_of(config)
    found = {}
    for name, recovery in {
        "none": Recovery(reconstruct=False, steps=0),
        "reconstructed": Recovery(steps=0),
        "distilled": Recovery(steps=30, batch=4, learning_rate=2e-3),
    }.items():
        model = model_of(config)
        out = sparsify_(model, text(24), Pattern.balanced(16), 0.5, method="wanda", recovery=recovery)
        found[name] = divergence(model, teacher, text(8, seed=9))
        assert len(out.losses) == recovery.steps
        for key, mask in out.masks.items():  # distillation moves no pruned entry
            assert torch.equal(model.get_submodule(key).weight != 0, mask)
            assert not model.get_submodule(key).weight.requires_grad
    assert found["distilled"] < found["reconstructed"] < found["none"]


def test_sparsify_is_deterministic():
    weights = []
    for _ in range(2):
        model = model_of(CONFIGS["plain"])
        sparsify_(model, text(4), Pattern.balanced(16), 0.75, recovery=Recovery(steps=2))
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_mistakes():
    model = model_of(CONFIGS["plain"])
    with pytest.raises(ValueError, match=r"\[sequences, tokens\]"):
        sparsify_(model, text()[0], Pattern.balanced(16), 0.5)
    with pytest.raises(ValueError, match="no layer 2 to skip"):
        sparsify_(model, text(), Pattern.balanced(16), 0.5, skip_layers=(2,))
    with pytest.raises(ValueError, match="at most"):
        sparsify_(model, text(), Pattern.balanced(16), 0.99)


def test_a_served_folder_has_its_tokenizer(tmp_path, smollm2_gguf):
    from actors.llumnix.engine.loading import load_tokenizer

    tokenizer = load_tokenizer(str(smollm2_gguf))
    save_checkpoint(tmp_path, model_of(CONFIGS["plain"]), {}, 16, tokenizer=tokenizer)
    again = load_tokenizer(str(tmp_path))
    messages = [{"role": "user", "content": "Grüße, 世界! <|im_end|> 42"}]
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert again.encode("x  y\n\tz") == tokenizer.encode("x  y\n\tz")
    assert again.eos_token_ids == tokenizer.eos_token_ids
    assert again.bos_token_id == tokenizer.bos_token_id
    assert balanced.is_balanced(tmp_path)
