"""The decoder stack composed in Python from the single kernels: the oracle of the compiled stack, bit for bit."""

from __future__ import annotations

import torch

from kernels import elementwise
from kernels.balanced import BalancedWeight
from kernels.balanced.linear import sparse
from kernels.decoder import Decoder, Matrix
from kernels.linear import linear as dense_linear
from kernels.paged_attention import paged_attention, write_kv


def forward(
    decoder: Decoder,
    kv: torch.Tensor,
    token_ids_T: torch.Tensor,
    positions_T: torch.Tensor,
    query_start: torch.Tensor,
    context_len_S: torch.Tensor,
    block_table_SN: torch.Tensor,
    logits_rows_R: torch.Tensor,
) -> torch.Tensor:
    """Same arguments and result as ``Decoder.forward``."""
    s = decoder.spec
    x_TH = decoder.embedding[token_ids_T].float()
    q_size, kv_size = s.heads * s.head_dim, s.kv_heads * s.head_dim
    where = (block_table_SN, query_start, context_len_S)
    for number, layer in enumerate(decoder.layers):
        qkv = linear(elementwise.rms_norm(x_TH, layer.attention_norm, s.rms_eps), layer.qkv, layer.qkv_bias)
        q, k, v = (part.reshape(len(part), -1, s.head_dim) for part in qkv.split([q_size, kv_size, kv_size], dim=1))
        if layer.q_norm is not None and layer.k_norm is not None:
            q = elementwise.rms_norm(q, layer.q_norm, s.rms_eps)
            k = elementwise.rms_norm(k, layer.k_norm, s.rms_eps)
        q = elementwise.rope(q, positions_T, decoder.rope_table, s.rope_interleaved)
        k = elementwise.rope(k, positions_T, decoder.rope_table, s.rope_interleaved)
        pool = kv[:, number]
        write_kv(k, v, pool, *where)
        attended = paged_attention(q, pool, *where, scale=float(torch.tensor(s.head_dim**-0.5)))
        x_TH = x_TH + linear(attended.flatten(1), layer.out)
        gate, up = linear(elementwise.rms_norm(x_TH, layer.ffn_norm, s.rms_eps), layer.gate_up).chunk(2, dim=1)
        x_TH = x_TH + linear(elementwise.silu_mul(gate, up), layer.down)
    last = elementwise.rms_norm(x_TH[logits_rows_R], decoder.final_norm, s.rms_eps)
    return linear(last, decoder.lm_head)


def linear(x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [rows, in] float32 times the matrix transposed; a balanced one by the sparse kernel in any batch."""
    if isinstance(matrix, BalancedWeight):
        return sparse(x, matrix, bias)
    return dense_linear(x, matrix, bias)
