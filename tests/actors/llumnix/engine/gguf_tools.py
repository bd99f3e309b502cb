"""Writes tiny GGUF files with the ``gguf`` library's writer, as llama.cpp's converter would from a transformers model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from actors.llumnix.engine.tokenizer import _BYTE_OF

TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# All bytes, then a few merges, so that every text can be encoded.
TOKENS = ["<|end|>", *sorted(_BYTE_OF), "he", "ll", "hell", "hello", "Ġhello", "Ġw", "<|chat|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ġ w"]
TEMPLATE = "{% for m in messages %}<|chat|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|chat|>{% endif %}"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q or K from Hugging Face's half layout to the interleaved one that GGUF stores for Llama."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def gguf_name(name: str) -> str:
    """GGUF's name of a transformers parameter."""
    if name in TOP:
        return TOP[name]
    if name == "lm_head.weight":
        return "output.weight"
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def write_gguf(
    path: Path,
    arch: str,
    config,
    state: dict[str, np.ndarray],
    kind: GgmlType = GgmlType.F32,
    extra: dict[str, np.ndarray] | None = None,
    metadata: dict[str, str] | None = None,
    drop: str | None = None,
) -> None:
    """A GGUF file of a transformers config and state; matrices are stored as ``kind`` (quantised by the library)."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.rope_parameters.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = TOKENS + [f"<unused{i}>" for i in range(config.vocab_size - len(TOKENS))]
    writer.add_token_list(tokens[: config.vocab_size])
    special = {TOKENS.index("<|end|>"), TOKENS.index("<|chat|>")}
    writer.add_token_types([3 if i in special else 1 for i in range(config.vocab_size)])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for key, value in (metadata or {}).items():
        writer.add_string(key, value)
    for name, weight in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = permute(weight, heads)
        stored = gguf_name(name)
        if stored == drop:
            continue
        if weight.ndim == 2 and kind != GgmlType.F32:
            writer.add_tensor(stored, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, weight)
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
