"""The ``cpp`` path: the whole decoder in one C++ operation (kernels.decoder), bit-exact across batches, chunks and threads.

Weights are packed layer by layer as they are read, so that at most one layer stands in memory twice. Those of a balanced
checkpoint are packed already; they keep their value type, and the sparse kernels take them in prefill, too, for the same bits.
"""

from __future__ import annotations

import torch

from actors.llumnix.engine.batch import ModelBatch
from actors.llumnix.engine.model_config import ModelConfig
from actors.llumnix.engine.weights.balanced import BalancedSource
from actors.llumnix.engine.weights.source import WeightSource
from kernels import build, linear
from kernels.decoder import Decoder, DecoderSpec, LayerWeights, Matrix, available


def problem_with(config: ModelConfig) -> str | None:
    """Why this path cannot run the model here, as the first half of a sentence; None if it can."""
    if config.o_bias:
        return "the compiled decoder has no bias on the attention's output, which this model has"
    if config.head_dim % 16:
        return f"the compiled attention wants head_dim to be a multiple of 16, and this model's is {config.head_dim}"
    if not available():
        return "the compiled kernels are not available (no C++ compiler? see `python -m kernels.build`)"
    return None


class CppRunner:
    """A kernels.decoder.Decoder fed with the engine's batches."""

    def __init__(self, source: WeightSource, dtype: linear.Kind, max_model_len: int):
        """Reads and packs the weights. ModelLoadError if one of them cannot be read."""
        c = source.config
        self.numerics = f"cpp-{linear.numerics(dtype)}"
        if isinstance(source, BalancedSource) and build.load("balanced"):
            self.numerics += f"-balanced-isa{torch.ops.sextant.balanced_set_isa(-1)}"

        def vector(name: str) -> torch.Tensor:
            return source.tensor(name).float()

        def pack(*names: str) -> Matrix:
            joined = source.joined(names) if isinstance(source, BalancedSource) else None
            if joined is not None:
                return joined
            parts = [source.tensor(name) for name in names]
            return linear.pack(parts[0] if len(parts) == 1 else torch.cat(parts), dtype)

        layers = []
        for i in range(c.num_layers):
            p = f"layers.{i}."
            bias = torch.cat([vector(p + b) for b in ("q_bias", "k_bias", "v_bias")]) if c.qkv_bias else None
            layers.append(
                LayerWeights(
                    attention_norm=vector(p + "attn_norm"),
                    qkv=pack(p + "q", p + "k", p + "v"),
                    out=pack(p + "o"),
                    ffn_norm=vector(p + "ffn_norm"),
                    gate_up=pack(p + "gate", p + "up"),
                    down=pack(p + "down"),
                    qkv_bias=bias,
                    q_norm=vector(p + "q_norm") if c.qk_norm else None,
                    k_norm=vector(p + "k_norm") if c.qk_norm else None,
                )
            )
        spec = DecoderSpec(
            hidden=c.hidden_size,
            layers=c.num_layers,
            heads=c.num_heads,
            kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            ffn=c.intermediate_size,
            vocab=c.vocab_size,
            rms_eps=c.rms_norm_eps,
            rope_interleaved=c.rope.interleaved,
        )
        embed = source.tensor("embed")
        head = linear.pack(embed if c.tie_word_embeddings else source.tensor("lm_head"), dtype)
        # The table of the fp32 model stays exact; the others halve it, since only one row per token is read.
        embedding = embed.to(torch.float32 if dtype == "fp32" else torch.bfloat16).contiguous()
        table = c.rope.cos_sin_table(c.head_dim, max_model_len).view(max_model_len, 2, c.head_dim // 2)
        self._decoder = Decoder(spec, embedding, layers, vector("final_norm"), head, table)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step of one token reads."""
        return self._decoder.weight_bytes

    def run(self, batch: ModelBatch, kv: torch.Tensor) -> torch.Tensor:
        """See ``model.Decoder``."""
        return self._decoder.forward(
            kv,
            batch.token_ids_T,
            batch.positions_T,
            batch.query_start,
            batch.context_len_S,
            batch.block_table_SN,
            batch.logits_rows_R,
        )
