"""Hugging Face folders: logits equal transformers' own models on tiny random ones; every kind of bad folder is one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.loading import ModelLoadError, build_model, load_model, read_model_config
from actors.llumnix.engine.weights.huggingface import HuggingFaceSource
from tests.actors.llumnix.engine.model_tools import blocks_for, make_batch

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 7,
    "bos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "llama-head-dim": ("Llama", {"head_dim": 32}),
    "llama-bias": ("Llama", {"attention_bias": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
}


def save(folder: Path, family: str, options: dict, **save_options) -> torch.nn.Module:
    """A random model with norms and biases that are not all ones and zeros, saved by transformers."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(torch.randn_like(p) * 0.3)
            else:
                p.mul_(6)  # Larger than the initialisation: attention and logits that are far from flat.
    model.save_pretrained(folder, **save_options)
    return model


def config_for(folder: Path, **options) -> EngineConfig:
    return EngineConfig(model=str(folder), device="cpu", **{"dtype": "fp32", **options})


def our_logits(folder: Path, tokens: list[int], chunk: int, **options) -> torch.Tensor:
    """Logits of every position, computed in chunks over blocks in descending order."""
    options = {"kernels": "torch", **options}
    model = build_model(HuggingFaceSource(folder), config_for(folder, **options), torch.device("cpu"))
    kv = model.new_kv(16)
    table = blocks_for(len(tokens), first=14, step=-2)
    rows = [
        model.forward(make_batch([(tokens[i : i + chunk], i, table)], all_rows=True), kv)
        for i in range(0, len(tokens), chunk)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(tmp_path, case):
    family, options = CASES[case]
    theirs = save(tmp_path, family, options)
    tokens = torch.randint(0, 96, (75,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0]
    assert expected.std() > 0.3
    for chunk in (75, 13, 1):
        torch.testing.assert_close(our_logits(tmp_path, tokens, chunk), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3"])
def test_compiled_decoder_equals_transformers(tmp_path, case):
    pytest.importorskip("kernels.decoder")
    family, options = CASES[case]
    theirs = save(tmp_path, family, options)
    tokens = torch.randint(0, 96, (75,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0]
    for chunk in (75, 13, 1):
        ours = our_logits(tmp_path, tokens, chunk, kernels="cpp")
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_smaller_weights_stay_near(tmp_path, dtype):
    """A bf16 weight is off by at most 2^-9 of itself, an int8 one by 1/254 of its row's largest."""
    theirs = save(tmp_path, "Llama", {})
    tokens = list(range(2, 60))
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0]
    ours = our_logits(tmp_path, tokens, 58, dtype=dtype)
    error = (ours - expected).norm() / expected.norm()
    assert 0 < error < 0.08


def test_bf16_kv_stays_near(tmp_path):
    save(tmp_path, "Llama", {})
    tokens = list(range(2, 60))
    wide, narrow = (our_logits(tmp_path, tokens, 20, kv_dtype=d) for d in ("fp32", "bf16"))
    assert 0 < (wide - narrow).norm() / wide.norm() < 0.02


def test_mixed_batch_equals_each_alone(tmp_path):
    """Two prefills and two decodes in one pass give what each gives alone (to rounding on the torch path)."""
    save(tmp_path, "Qwen3", CASES["qwen3"][1])
    model = build_model(HuggingFaceSource(tmp_path), config_for(tmp_path, kernels="torch"), torch.device("cpu"))
    texts = [list(range(3, 40)), list(range(50, 55)), list(range(20, 53)), [9] * 20]
    tables = [blocks_for(48, 1 + 3 * s) for s in range(4)]
    alone = []
    for text, table in zip(texts, tables, strict=True):
        kv = model.new_kv(16)
        alone.append(model.forward(make_batch([(text, 0, table)]), kv)[0])
    kv = model.new_kv(16)
    model.forward(make_batch([(texts[2][:-1], 0, tables[2]), (texts[3][:-1], 0, tables[3])]), kv)
    mixed = make_batch(
        [
            (texts[0], 0, tables[0]),
            (texts[2][-1:], len(texts[2]) - 1, tables[2]),
            (texts[1], 0, tables[1]),
            (texts[3][-1:], len(texts[3]) - 1, tables[3]),
        ]
    )
    logits = model.forward(mixed, kv)
    for row, s in enumerate((0, 2, 1, 3)):
        torch.testing.assert_close(logits[row], alone[s], rtol=1e-4, atol=1e-4)


def test_sharded_and_half_precision_files(tmp_path):
    theirs = save(tmp_path / "whole", "Llama", {})
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    tokens = list(range(2, 40))
    rounded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "sharded", dtype=torch.float32)
    with torch.no_grad():
        expected = rounded(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(our_logits(tmp_path / "sharded", tokens, 40), expected, rtol=1e-4, atol=1e-4)


def test_old_style_config_is_read(tmp_path):
    """transformers 4 wrote rope_theta and rope_scaling where 5 writes rope_parameters."""
    save(tmp_path, "Llama", {"rope_parameters": LLAMA3})
    new = read_model_config(str(tmp_path))
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = rope
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_model_config(str(tmp_path)) == new


def test_generation_config_wins_over_config(tmp_path):
    save(tmp_path, "Llama", {})
    assert read_model_config(str(tmp_path)).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert read_model_config(str(tmp_path)).eos_token_ids == (7, 9)


def test_sliding_window_bounds_the_context(tmp_path):
    save(tmp_path, "Qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 0})
    assert read_model_config(str(tmp_path)).max_position_embeddings == 100


def test_numerics_name_weights_and_types(tmp_path):
    names = set()
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        model = save(folder, "Llama", {})
        if seed:
            model.model.norm.weight.data[3] += 1e-3
            model.save_pretrained(folder)
        for dtype in ("fp32", "bf16"):
            for kv_dtype in ("fp32", "bf16"):
                config = config_for(folder, dtype=dtype, kv_dtype=kv_dtype, kernels="torch")
                names.add(build_model(HuggingFaceSource(folder), config, torch.device("cpu")).numerics)
    assert len(names) == 8


# ---- bad folders


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel'"),
        ({"architectures": None}, "architecture None"),
        ({"hidden_size": None}, "lacks the key hidden_size"),
        ({"hidden_size": "64"}, "unusable value '64' for the key hidden_size"),
        ({"hidden_size": 48}, "shape"),
        ({"num_hidden_layers": 3}, r"lacks the tensor model\.layers\.2"),
        ({"num_hidden_layers": -1}, "num_layers = -1"),
        ({"num_key_value_heads": 3}, "do not share 3 KV heads"),
        ({"vocab_size": 97}, r"shape \[96, 64\].*promises \[97, 64\]"),
        ({"head_dim": 15}, "odd"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks the key factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -1.0}}, "must be positive"),
        ({"rope_parameters": [1]}, "must be an object"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"mlp_bias": True}, "biases in its MLP"),
        ({"attention_bias": True}, r"lacks the tensor .*bias"),
        ({"quantization_config": {"bits": 4}}, "pre-quantised"),
    ],
)
def test_bad_config_is_one_sentence(tmp_path, changes, says):
    save(tmp_path, "Llama", {})
    edit(tmp_path, **changes)
    with pytest.raises(ModelLoadError, match=says) as caught:
        HuggingFaceSource(tmp_path)
    assert "\n" not in str(caught.value)


def break_json(folder):
    (folder / "config.json").write_text('{"architectures": [')


def list_json(folder):
    (folder / "config.json").write_text("[1, 2]")


def not_utf8(folder):
    (folder / "config.json").write_bytes(b'\xff\xfe{"a": 1}')


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def truncate_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def truncate_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")


def index_without_files(folder):
    (folder / "model.safetensors").unlink()
    names = {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def index_outside(folder):
    names = {"model.embed_tokens.weight": "../secret.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def no_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (break_json, "cannot read .*config.json"),
        (list_json, "must hold a JSON object"),
        (not_utf8, "cannot read .*config.json"),
        (no_config, "has no config.json"),
        (no_weights, "has no weights"),
        (truncate_weights, "damaged or truncated"),
        (truncate_header, "damaged or truncated"),
        (empty_weights, "damaged or truncated"),
        (index_without_files, "missing|lacks"),
        (index_outside, "outside its folder"),
    ],
)
def test_damaged_folder_is_one_sentence(tmp_path, damage, says):
    save(tmp_path, "Llama", {})
    damage(tmp_path)
    with pytest.raises(ModelLoadError, match=says) as caught:
        HuggingFaceSource(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no-such-model", "there is no model 'no-such-model'"),
        ("/no/such/folder", "there is no model"),
        ("/no/such/file.gguf", "there is no file"),
        ("owner/name-that-is-not-cached", "neither a local path nor in the hub's cache"),
        ("a" * 5000, "no usable model name"),
        ("zero\0byte", "no usable model name|there is no model"),
        ("", "there is no model|config.json"),
    ],
)
def test_unknown_name_is_one_sentence(name, says):
    with pytest.raises(ModelLoadError, match=says) as caught:
        load_model(EngineConfig(model=name, device="cpu"))
    assert "\n" not in str(caught.value)


def test_cuda_without_a_device_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ModelLoadError, match="no CUDA device"):
        load_model(EngineConfig(device="cuda"))


def test_block_size_is_fixed():
    with pytest.raises(ModelLoadError, match="block_size = 32"):
        load_model(EngineConfig(block_size=32))
