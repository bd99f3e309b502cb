"""The decoder in plain torch, for any device: the fallback on a CPU without a compiler, and what the CUDA path is made of.

Shape suffixes: T tokens of all sequences, S sequences, N block-table columns, R rows with logits, H hidden size, Q query
width (heads x head_dim), D head_dim. The residual stream is fp32; matrices are fp32, bf16 or int8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from actors.llumnix.engine.model_config import ModelConfig
from actors.llumnix.engine.weights.source import WeightSource
from kernels.linear import reference
from kernels.paged_attention import paged_attention, write_kv

AttentionBackend = Literal["torch", "triton"]
FIXED_ROWS = 64
"""Rows of every matrix product in deterministic mode."""
_MIN_INT8_ROWS = 32
"""cuBLAS multiplies int8 matrices of more than 16 rows only."""


class Linear:
    """x [M, K] fp32 -> x W^T + b [M, N] fp32, with W [N, K] held as fp32, bf16, or int8 with a scale per output channel.

    With ``fixed_rows`` every product has that many rows, padded with zeros: the library then picks one algorithm whatever the
    batch, and a row's bits depend on the row alone. It costs a decode step little (which waits for the weights) and a
    prefill the re-reading of the weights for every piece; benchmarks.llumnix_engine states how much.
    """

    def __init__(
        self,
        weight_NK: torch.Tensor,
        dtype: str,
        device: torch.device,
        bias_N: torch.Tensor | None = None,
        fixed_rows: int | None = None,
    ):
        self.dtype, self.fixed_rows = dtype, fixed_rows
        self.bias = None if bias_N is None else bias_N.to(device, torch.float32)
        self.scales: torch.Tensor | None = None
        weight = weight_NK.to(device)
        if dtype == "int8":
            # Not transposed in memory: both CPU and cuBLAS want the second matrix by columns.
            self.weight, self.scales = reference.quantise_weight(weight)
        else:
            self.weight = weight.to(torch.float32 if dtype == "fp32" else torch.bfloat16).contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of weights that one product reads."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.weight.nbytes + scales + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x_MK: torch.Tensor) -> torch.Tensor:
        if self.scales is not None:
            out = self._int8(x_MK, self.scales)
        elif self.fixed_rows is None:
            out = F.linear(x_MK.to(self.weight.dtype), self.weight).float()
        else:
            out = self._in_pieces(x_MK.to(self.weight.dtype), self.fixed_rows)
        return out if self.bias is None else out.add_(self.bias)

    def _in_pieces(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        count = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -count % rows))
        pieces = [F.linear(piece, self.weight) for piece in padded.split(rows)]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[:count].float()

    def _int8(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Integer sums are exact, so this is the same bits in any batch; the padding only satisfies the library."""
        quantised, row_scales = reference.quantise_rows(x)
        count = x.shape[0]
        if x.is_cuda and count < _MIN_INT8_ROWS:
            quantised = F.pad(quantised, (0, 0, 0, _MIN_INT8_ROWS - count))
        sums = torch._int_mm(quantised, self.weight.T)[:count]
        return sums.float().mul_(row_scales[:, None] * scales[None, :])


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 (Zhang and Sennrich 2019)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """RoPE: every pair (a, b) of a head becomes (a cos - b sin, b cos + a sin). cos and sin: [T, 1, D/2]."""
    if interleaved:
        a, b = x_THD[..., 0::2], x_THD[..., 1::2]
        return torch.stack((a * cos_TD - b * sin_TD, b * cos_TD + a * sin_TD), dim=-1).flatten(-2)
    a, b = x_THD.chunk(2, dim=-1)
    return torch.cat((a * cos_TD - b * sin_TD, b * cos_TD + a * sin_TD), dim=-1)


@dataclass(frozen=True)
class _Layer:
    attn_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    ffn_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class TorchDecoder:
    """The whole decoder stack on one device, over the shared KV pool."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        dtype: str,
        device: torch.device,
        max_model_len: int,
        attention: AttentionBackend = "torch",
        deterministic: bool = False,
    ):
        """Reads the weights. ModelLoadError if one of them cannot be read."""
        self.config, self.device, self.attention, self.deterministic = config, device, attention, deterministic
        fixed_rows = FIXED_ROWS if deterministic else None
        table = config.rope.cos_sin_table(config.head_dim, min(max_model_len, config.max_position_embeddings))
        self._cos_sin = table.to(device)

        def vector(name: str) -> torch.Tensor:
            return source.tensor(name).to(device, torch.float32)

        def linear(names: tuple[str, ...], biases: tuple[str, ...] = ()) -> Linear:
            weight = torch.cat([source.tensor(name) for name in names])
            bias = torch.cat([vector(name) for name in biases]) if biases else None
            return Linear(weight, dtype, device, bias, fixed_rows)

        self._layers = []
        for i in range(config.num_layers):
            p = f"layers.{i}."
            self._layers.append(
                _Layer(
                    attn_norm=vector(p + "attn_norm"),
                    qkv=linear(
                        (p + "q", p + "k", p + "v"),
                        (p + "q_bias", p + "k_bias", p + "v_bias") if config.qkv_bias else (),
                    ),
                    q_norm=vector(p + "q_norm") if config.qk_norm else None,
                    k_norm=vector(p + "k_norm") if config.qk_norm else None,
                    o=linear((p + "o",), (p + "o_bias",) if config.o_bias else ()),
                    ffn_norm=vector(p + "ffn_norm"),
                    gate_up=linear((p + "gate", p + "up")),
                    down=linear((p + "down",)),
                )
            )
        self._final_norm = vector("final_norm")
        embed = source.tensor("embed")
        head = embed if config.tie_word_embeddings else source.tensor("lm_head")
        self._head = Linear(head, dtype, device, fixed_rows=fixed_rows)
        if config.tie_word_embeddings and dtype != "int8":
            self._embed = self._head.weight
        else:
            self._embed = embed.to(device, torch.float32 if dtype == "fp32" else torch.bfloat16)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step of one token reads."""
        linears = [m for layer in self._layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return sum(m.nbytes for m in (*linears, self._head))

    @torch.inference_mode()
    def forward(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        query_start: torch.Tensor,
        context_len_S: torch.Tensor,
        block_table_SN: torch.Tensor,
        logits_rows_R: torch.Tensor,
        kv: torch.Tensor,
        max_query_len: int | None = None,
    ) -> torch.Tensor:
        """Logits fp32 [R, vocab]; writes the tokens' keys and values into ``kv``. All tensors are on this device."""
        c = self.config
        x_TH = F.embedding(token_ids_T, self._embed).float()
        cos_TD, sin_TD = self._cos_sin[positions_T.long()].unsqueeze(1).chunk(2, dim=-1)
        for i, layer in enumerate(self._layers):
            normed_TH = rms_norm(x_TH, layer.attn_norm, c.rms_norm_eps)
            q, k, v = layer.qkv(normed_TH).split((c.q_size, c.kv_size, c.kv_size), dim=-1)
            q_THD, k_THD, v_THD = (y.unflatten(-1, (-1, c.head_dim)) for y in (q, k, v))
            if layer.q_norm is not None and layer.k_norm is not None:
                q_THD = rms_norm(q_THD, layer.q_norm, c.rms_norm_eps)
                k_THD = rms_norm(k_THD, layer.k_norm, c.rms_norm_eps)
            q_THD = rotate(q_THD, cos_TD, sin_TD, c.rope.interleaved)
            k_THD = rotate(k_THD, cos_TD, sin_TD, c.rope.interleaved)
            kv_layer = kv[:, i]
            write_kv(k_THD, v_THD, kv_layer, block_table_SN, query_start, context_len_S, backend=self.attention)
            attended_THD = paged_attention(
                q_THD,
                kv_layer,
                block_table_SN,
                query_start,
                context_len_S,
                c.head_dim**-0.5,
                backend=self.attention,
                max_query_len=max_query_len,
                deterministic=self.deterministic,
            )
            x_TH = x_TH + layer.o(attended_THD.flatten(1))
            gate, up = layer.gate_up(rms_norm(x_TH, layer.ffn_norm, c.rms_norm_eps)).chunk(2, dim=-1)
            x_TH = x_TH + layer.down(F.silu(gate) * up)
        return self._head(rms_norm(x_TH[logits_rows_R], self._final_norm, c.rms_norm_eps))
