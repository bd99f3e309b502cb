"""A Llama-family decoder that can be pruned and trained: the serving engine's weights as torch modules, without a cache.

Modules carry the engine's names (``layers.3.gate``), so that a weight goes from the engine's files to here and back by name.
Shape suffixes: B sequences, T tokens, H hidden size, N heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from actors.llumnix.engine.model_config import ModelConfig
from actors.llumnix.engine.model_torch import rms_norm, rotate
from actors.llumnix.engine.weights.source import WeightSource


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class LlamaLayer(nn.Module):
    """Attention and feed-forward of one layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        self.attn_norm, self.ffn_norm = RmsNorm(c.hidden_size, c.rms_norm_eps), RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.q = nn.Linear(c.hidden_size, c.q_size, c.qkv_bias)
        self.k = nn.Linear(c.hidden_size, c.kv_size, c.qkv_bias)
        self.v = nn.Linear(c.hidden_size, c.kv_size, c.qkv_bias)
        self.o = nn.Linear(c.q_size, c.hidden_size, c.o_bias)
        self.gate = nn.Linear(c.hidden_size, c.intermediate_size, False)
        self.up = nn.Linear(c.hidden_size, c.intermediate_size, False)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, False)
        if c.qk_norm:
            self.q_norm, self.k_norm = RmsNorm(c.head_dim, c.rms_norm_eps), RmsNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x_BTH: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
        """[B, T, H] after the layer; cosines and sines [T, 1, D/2] of the positions."""
        x_BTH = x_BTH + self.o(self.attend(self.attn_norm(x_BTH), cos_T1D, sin_T1D))
        return x_BTH + self.down(self.gated(self.ffn_norm(x_BTH)))

    def attend(self, normed_BTH: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
        """Inputs of ``o`` [B, T, q_size] from those of ``q``, ``k`` and ``v``."""
        c = self.config
        q, k, v = (
            linear(normed_BTH).unflatten(-1, (-1, c.head_dim)) for linear in (self.q, self.k, self.v)
        )  # [B, T, N, D]
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(y, cos_T1D, sin_T1D, c.rope.interleaved) for y in (q, k))
        attended_BNTD = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return attended_BNTD.transpose(1, 2).flatten(2)

    def gated(self, normed_BTH: torch.Tensor) -> torch.Tensor:
        """Inputs of ``down`` [B, T, intermediate] from those of ``gate`` and ``up``."""
        return F.silu(self.gate(normed_BTH)) * self.up(normed_BTH)


class Llama(nn.Module):
    """The whole decoder, float32."""

    cos_sin: torch.Tensor

    def __init__(self, config: ModelConfig, max_tokens: int = 2048):
        super().__init__()
        self.config = config
        length = min(max_tokens, config.max_position_embeddings)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.num_layers))
        self.final_norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight
        self.register_buffer("cos_sin", config.rope.cos_sin_table(config.head_dim, length), persistent=False)

    @classmethod
    def from_source(cls, source: WeightSource, max_tokens: int = 2048) -> Llama:
        """With the weights of a model file (``actors.llumnix.engine.loading.open_weights``). ModelLoadError."""
        with torch.device("meta"):
            model = cls(source.config, max_tokens)
        model.cos_sin = source.config.rope.cos_sin_table(source.config.head_dim, len(model.cos_sin))
        weights = {parameter: source.tensor(name).float() for parameter, name in model.names().items()}
        model.load_state_dict(
            {**weights, "lm_head.weight": weights.get("lm_head.weight", weights["embed.weight"])}, assign=True
        )
        if source.config.tie_word_embeddings:
            model.lm_head.weight = model.embed.weight
        return model.eval().requires_grad_(False)

    def names(self) -> dict[str, str]:
        """Name in the state dict -> name in the engine (``expected_shapes``)."""
        return {
            name: name.replace(".bias", "_bias").removesuffix(".weight")
            for name in self.state_dict()
            if not (name == "lm_head.weight" and self.config.tie_word_embeddings)
        }

    def angles(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [T, 1, D/2] of positions 0 ... tokens - 1. ValueError for more than the model was made for."""
        if tokens > len(self.cos_sin):
            raise ValueError(f"{tokens} tokens are more than the {len(self.cos_sin)} that this model was made for")
        cos, sin = self.cos_sin[:tokens].unsqueeze(1).chunk(2, dim=-1)
        return cos, sin

    def forward(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, vocab]."""
        angles = self.angles(token_ids_BT.shape[1])
        x_BTH = self.embed(token_ids_BT)
        for layer in self.layers:
            x_BTH = layer(x_BTH, *angles)
        return self.lm_head(self.final_norm(x_BTH))
