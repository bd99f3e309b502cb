"""GGUF files: block formats against the ``gguf`` library, logits against transformers, and damage of every kind."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgmlType
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.loading import ModelLoadError, build_model, load_tokenizer, read_model_config
from actors.llumnix.engine.tokenizer import tokenizer_from_gguf
from actors.llumnix.engine.weights.dequantise import dequantise
from actors.llumnix.engine.weights.gguf import GgufSource
from tests.actors.llumnix.engine.gguf_tools import TOKENS, write_gguf
from tests.actors.llumnix.engine.model_tools import blocks_for, make_batch

transformers = pytest.importorskip("transformers")

OWN = [GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q4_K, GgmlType.Q6_K]
FROM_LIBRARY = [GgmlType.Q5_0, GgmlType.Q5_1, GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q5_K, GgmlType.IQ4_NL]


def random_blocks(kind: GgmlType, count: int) -> np.ndarray:
    """Random bytes with finite half-precision scales: exponents from -8 to 7."""
    rng = np.random.default_rng(int(kind))
    _, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    places = {GgmlType.Q4_1: (0, 2), GgmlType.Q4_K: (0, 2), GgmlType.Q5_K: (0, 2), GgmlType.Q5_1: (0, 2)}
    at = places.get(kind, {GgmlType.Q6_K: (208,), GgmlType.Q2_K: (80, 82), GgmlType.Q3_K: (108,)}.get(kind, (0,)))
    for place in at:
        scale = (rng.standard_normal(count) * 2.0 ** rng.integers(-8, 8, count)).astype(np.float16)
        blocks[:, place : place + 2] = scale[:, None].view(np.uint8)
    return blocks


@pytest.mark.parametrize("kind", OWN + FROM_LIBRARY, ids=lambda k: k.name)
def test_dequantisation_equals_the_library(kind):
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    blocks = random_blocks(kind, 96)
    shape = (12, 8 * block)
    expected = gguf.quants.dequantize(blocks.reshape(12, -1), kind)
    found = dequantise(torch.from_numpy(blocks.reshape(-1)), kind, shape)
    assert found.dtype == torch.float32
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(found.numpy(), expected.reshape(shape))


def test_q4_1_by_hand():
    """One block: scale 0.5, minimum -1; byte i holds weight i in its low half and weight i + 16 in its high half."""
    raw = np.zeros(20, dtype=np.uint8)
    raw[:2] = np.array([0.5], np.float16).view(np.uint8)
    raw[2:4] = np.array([-1.0], np.float16).view(np.uint8)
    raw[4] = 0x3F
    raw[19] = 0x80
    found = dequantise(torch.from_numpy(raw), GgmlType.Q4_1, (1, 32))[0]
    assert found[0] == 15 * 0.5 - 1
    assert found[16] == 3 * 0.5 - 1
    assert found[15] == -1
    assert found[31] == 8 * 0.5 - 1


def test_q4_0_and_q8_0_by_hand():
    raw = np.zeros(18, dtype=np.uint8)
    raw[:2] = np.array([2.0], np.float16).view(np.uint8)
    raw[2] = 0x1F
    found = dequantise(torch.from_numpy(raw), GgmlType.Q4_0, (32,))
    assert (found[0], found[16], found[1]) == ((15 - 8) * 2, (1 - 8) * 2, -16)
    raw = np.zeros(34, dtype=np.uint8)
    raw[:2] = np.array([0.25], np.float16).view(np.uint8)
    raw[2], raw[33] = 0x80, 127
    found = dequantise(torch.from_numpy(raw), GgmlType.Q8_0, (32,))
    assert (found[0], found[31], found[5]) == (-32.0, 127 / 4, 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_plain_numbers_keep_their_bits(dtype):
    values = np.random.default_rng(0).standard_normal((3, 5)).astype(dtype)
    kind = GgmlType.F32 if dtype == np.float32 else GgmlType.F16
    found = dequantise(torch.from_numpy(values.reshape(-1).view(np.uint8).copy()), kind, (3, 5))
    np.testing.assert_array_equal(found.numpy(), values)


def tiny(family: str = "Llama", **options):
    """A random transformers model whose vocabulary is the tiny files' one."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": 272,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            **options,
        }
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * 0.3) if "norm" in name or name.endswith("bias") else p.mul_(4)
    return model


def state_of(model) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in model.state_dict().items()}


def our_logits(path, tokens, chunk=30) -> torch.Tensor:
    config = EngineConfig(model=str(path), device="cpu", dtype="fp32", kernels="torch")
    model = build_model(GgufSource(path), config, torch.device("cpu"))
    kv = model.new_kv(12)
    table = blocks_for(len(tokens), first=11, step=-1)
    return torch.cat(
        [
            model.forward(make_batch([(tokens[i : i + chunk], i, table)], all_rows=True), kv)
            for i in range(0, len(tokens), chunk)
        ]
    )


FAMILIES = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-bias": ("Llama", {"attention_bias": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}
TEXT = torch.randint(0, 272, (70,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.mark.parametrize("case", FAMILIES)
def test_logits_equal_transformers(tmp_path, case):
    """Both RoPE layouts: Llama's Q and K are stored permuted, Qwen's are not."""
    family, options = FAMILIES[case]
    model = tiny(family, **options)
    write_gguf(tmp_path / "m.gguf", case.split("-")[0], model.config, state_of(model))
    with torch.no_grad():
        expected = model(torch.tensor([TEXT])).logits[0]
    assert expected.std() > 0.3
    torch.testing.assert_close(our_logits(tmp_path / "m.gguf", TEXT), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [GgmlType.F16, GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q4_1], ids=lambda k: k.name)
def test_quantised_logits_equal_transformers_with_rounded_weights(tmp_path, kind):
    model = tiny()
    write_gguf(tmp_path / "m.gguf", "llama", model.config, state_of(model), kind)
    with torch.no_grad():
        for p in model.parameters():
            if (
                p.dim() == 2
            ):  # Blocks lie within a row, and the permutation moves whole rows: rounding commutes with it.
                rounded = gguf.quants.dequantize(gguf.quants.quantize(p.numpy(), kind), kind)
                p.copy_(torch.from_numpy(rounded.astype(np.float32)))
        expected = model(torch.tensor([TEXT])).logits[0]
    torch.testing.assert_close(our_logits(tmp_path / "m.gguf", TEXT), expected, rtol=1e-4, atol=1e-4)


def test_rope_factors_are_llama3_scaling(tmp_path):
    """llama.cpp stores Llama 3's scaling as one divisor per frequency in rope_freqs.weight."""
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    model = tiny(rope_parameters=rope)
    plain = tiny(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    factors = (plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq).numpy()
    assert factors.max() == pytest.approx(8)
    write_gguf(tmp_path / "m.gguf", "llama", model.config, state_of(model), extra={"rope_freqs.weight": factors})
    with torch.no_grad():
        expected = model(torch.tensor([TEXT])).logits[0]
    torch.testing.assert_close(our_logits(tmp_path / "m.gguf", TEXT), expected, rtol=2e-4, atol=2e-4)


# ---- damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of a sound file with small matrices, and the length of its header."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    model = tiny(hidden_size=64, intermediate_size=64, num_hidden_layers=1, head_dim=16)
    write_gguf(path, "llama", model.config, state_of(model))
    data = path.read_bytes()
    first = min(info.offset for info in GgufSource(path).file.tensors.values())
    return data, first


def open_bytes(tmp_path, data: bytes):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    source = GgufSource(path)
    tokenizer_from_gguf(path, source.file.metadata, source.config.eos_token_ids)
    source.tensor("layers.0.q")
    return source


def test_sound_file_opens(tmp_path, sound):
    source = open_bytes(tmp_path, sound[0])
    assert source.config.num_layers == 1
    assert source.config.eos_token_ids == (0,)
    assert load_tokenizer(str(source.path)).encode("hello") == [TOKENS.index("hello")]
    assert read_model_config(str(source.path)) == source.config


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.05, 0.3, 0.7, 0.99, 0.9999])
def test_truncation_is_one_sentence(tmp_path, sound, share):
    data, _ = sound
    with pytest.raises(ModelLoadError, match=r"truncated|cannot read|not a GGUF|lacks") as caught:
        open_bytes(tmp_path, data[: int(len(data) * share)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("at", "new", "says"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "version"),
        (8, struct.pack("<Q", 1 << 60), "truncated|damaged|unknown type"),
        (16, struct.pack("<Q", 1 << 60), "truncated|damaged"),
        (24, struct.pack("<Q", 1 << 62), "truncated"),
    ],
)
def test_flipped_header_is_one_sentence(tmp_path, sound, at, new, says):
    data = bytearray(sound[0])
    data[at : at + len(new)] = new
    with pytest.raises(ModelLoadError, match=says) as caught:
        open_bytes(tmp_path, bytes(data))
    assert "\n" not in str(caught.value)


@settings(max_examples=150)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
@example([(0.999, 255)])
def test_byte_flips_raise_only_model_load_error(sound, tmp_path_factory, flips):
    data, header = sound
    damaged = bytearray(data)
    for where, value in flips:
        damaged[int(where * header)] = value
    try:
        open_bytes(tmp_path_factory.getbasetemp(), bytes(damaged))
    except ModelLoadError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"arch": "gpt2"}, "architecture 'gpt2'"),
        ({"drop": "blk.0.ffn_up.weight"}, r"lacks the tensor blk\.0\.ffn_up\.weight"),
        ({"drop": "token_embd.weight"}, r"lacks the tensor token_embd\.weight"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "'yarn'"),
        ({"metadata": {"llama.expert_count": "8"}}, "mixture-of-experts"),
    ],
)
def test_unfit_model_is_one_sentence(tmp_path, options, says):
    model = tiny(hidden_size=64, intermediate_size=64, num_hidden_layers=1, head_dim=16)
    path = tmp_path / "m.gguf"
    write_gguf(path, options.pop("arch", "llama"), model.config, state_of(model), **options)
    with pytest.raises(ModelLoadError, match=says):
        GgufSource(path)


def test_wrong_shape_and_unread_format(tmp_path):
    model = tiny(hidden_size=64, intermediate_size=64, num_hidden_layers=1, head_dim=16)
    state = state_of(model)
    state["model.layers.0.mlp.up_proj.weight"] = np.zeros((32, 64), np.float32)
    write_gguf(tmp_path / "shape.gguf", "llama", model.config, state)
    with pytest.raises(ModelLoadError, match=r"ffn_up.weight has shape \[32, 64\].*promises \[64, 64\]"):
        GgufSource(tmp_path / "shape.gguf")
    state["model.layers.0.mlp.up_proj.weight"] = np.zeros((64, 64), np.int32)
    write_gguf(tmp_path / "type.gguf", "llama", model.config, state)
    with pytest.raises(ModelLoadError, match="stored as I32, which is not supported"):
        GgufSource(tmp_path / "type.gguf")


def test_a_folder_named_gguf_or_a_text_file(tmp_path):
    with pytest.raises(ModelLoadError, match="cannot read"):
        GgufSource(tmp_path)
    (tmp_path / "m.gguf").write_text("# a note")
    with pytest.raises(ModelLoadError, match="not a GGUF file"):
        GgufSource(tmp_path / "m.gguf")
