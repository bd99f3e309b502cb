"""The rival of the engine's benchmark and the oracle of its tests: transformers' Llama with the very weights of ours.

transformers can read GGUF itself, but takes half a minute for it; this hands it the tensors that our reader gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from actors.llumnix.engine.weights.source import WeightSource

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_PARTS = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def to_half_layout(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of Q or K [heads * D, H] from interleaved RoPE pairs (2i, 2i+1) to Hugging Face's (i, i + D/2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def transformers_twin(source: WeightSource, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A transformers LlamaForCausalLM with the weights of ``source``. ValueError if it is not a plain Llama.

    Needs the ``transformers`` package (ImportError says so).
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    c = source.config
    if c.qkv_bias or c.qk_norm or c.rope.scaling != "default" or c.rope.freq_factors is not None:
        raise ValueError(f"the twin is written for plain Llama models, and this is a {c.architecture} with extras")
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope.theta},
        tie_word_embeddings=c.tie_word_embeddings,
        eos_token_id=list(c.eos_token_ids),
        bos_token_id=c.bos_token_id,
        pad_token_id=c.eos_token_ids[0] if c.eos_token_ids else 0,
    )
    state: dict[str, Any] = {
        "model.embed_tokens.weight": source.tensor("embed"),
        "model.norm.weight": source.tensor("final_norm"),
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if c.tie_word_embeddings else source.tensor("lm_head")
    for i in range(c.num_layers):
        for ours, theirs in _PARTS.items():
            weight = source.tensor(f"layers.{i}.{ours}")
            if c.rope.interleaved and ours in ("q", "k"):
                weight = to_half_layout(weight, c.num_heads if ours == "q" else c.num_kv_heads)
            state[f"model.layers.{i}.{theirs}.weight"] = weight
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):  # No random initialisation of weights that are replaced at once.
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    # The frequencies are buffers that a checkpoint does not hold: made anew, in fp32, off the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.load_state_dict({name: value.to(dtype) for name, value in state.items()}, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        eos_token_id=list(c.eos_token_ids), bos_token_id=c.bos_token_id, pad_token_id=config.pad_token_id
    )
    return model.eval()
