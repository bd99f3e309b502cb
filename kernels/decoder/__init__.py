"""A Llama-shaped decoder stack on the CPU in one C++ call: embedding, layers over the paged KV pool, logits of chosen rows.

``Decoder`` composes kernels.linear, kernels.elementwise and kernels.paged_attention inside C++, so that a step costs one call and
releases Python's lock once; ``reference.forward`` composes the same ops in Python and gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from kernels.balanced import INDEX_KINDS, BalancedWeight
from kernels.linear import KINDS, PackedLinear

__all__ = ["Decoder", "DecoderSpec", "LayerWeights", "Matrix", "available"]

Matrix = PackedLinear | BalancedWeight
"""A matrix of the stack: dense panels, or a balanced weight in the ``lanes`` layout."""


@dataclass(frozen=True)
class DecoderSpec:
    """Shape of the stack. Sizes in elements; ``ffn`` is the width of gate and of up."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rms_eps: float = 1e-5
    rope_interleaved: bool = False


@dataclass(frozen=True)
class LayerWeights:
    """One layer. ``qkv`` has q's, k's, then v's output columns; ``gate_up`` gate's, then up's."""

    attention_norm: torch.Tensor
    """[hidden]"""
    qkv: Matrix
    out: Matrix
    ffn_norm: torch.Tensor
    """[hidden]"""
    gate_up: Matrix
    down: Matrix
    qkv_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    """[head_dim]: RMSNorm of each query head before the rotation (Qwen3)."""
    k_norm: torch.Tensor | None = None


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether the compiled stack can run here."""
    from kernels import build

    return bool(build.load("decoder"))


class Decoder:
    """The compiled stack over weights handed to it once; it keeps references to them, no copies.

    ``embedding`` is float32 or bfloat16 [vocab, hidden]; ``rope_table`` is ``kernels.elementwise.rope_table``'s. Raises
    RuntimeError without a compiler and ValueError for weights that do not fit the spec.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        embedding: torch.Tensor,
        layers: list[LayerWeights],
        final_norm: torch.Tensor,
        lm_head: Matrix,
        rope_table: torch.Tensor,
    ):
        if not available():
            raise RuntimeError(
                "the compiled decoder needs a C++ compiler: install one and run `python -m kernels.build`"
            )
        if len(layers) != spec.layers:
            raise ValueError(f"{len(layers)} layers of weights for a stack of {spec.layers}")
        self.spec = spec
        self.embedding, self.layers, self.final_norm = embedding, layers, final_norm
        self.lm_head, self.rope_table = lm_head, rope_table
        tensors = [embedding, final_norm.float(), rope_table, *_parts(lm_head)]
        for layer in layers:
            tensors += [layer.attention_norm.float(), *_parts(layer.qkv), _or_empty(layer.qkv_bias)]
            tensors += [_or_empty(layer.q_norm), _or_empty(layer.k_norm), *_parts(layer.out), layer.ffn_norm.float()]
            tensors += [*_parts(layer.gate_up), *_parts(layer.down)]
        matrices = [lm_head, *(m for x in layers for m in (x.qkv, x.out, x.gate_up, x.down))]
        kinds = [number for matrix in matrices for number in _kind(matrix)]
        sizes = [spec.hidden, spec.layers, spec.heads, spec.kv_heads, spec.head_dim, spec.ffn, spec.vocab]
        self._stack: Any = torch.classes.sextant.Decoder(
            [*sizes, int(spec.rope_interleaved)], spec.rms_eps, kinds, [tensor.contiguous() for tensor in tensors]
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step of one token reads (the embedding's one row aside)."""
        packed = [p for x in self.layers for p in (x.qkv, x.out, x.gate_up, x.down)]
        return sum(p.nbytes for p in (*packed, self.lm_head))

    def forward(
        self,
        kv: torch.Tensor,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        query_start: torch.Tensor,
        context_len_S: torch.Tensor,
        block_table_SN: torch.Tensor,
        logits_rows_R: torch.Tensor,
    ) -> torch.Tensor:
        """Logits float32 [R, vocab]; writes keys and values of all T tokens into the pool ``kv``.

        ``kv`` is [blocks, layers, 2, kv_heads, head_dim * 16], float32 or bfloat16; the other tensors as in
        ``actors.llumnix.engine.batch.ModelBatch``. Raises ValueError, TypeError or IndexError for a batch that does not fit.
        """
        return torch.ops.sextant.decoder_forward(
            self._stack, kv, token_ids_T, positions_T, query_start, context_len_S, block_table_SN, logits_rows_R
        )


def _parts(matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if isinstance(matrix, BalancedWeight):
        return matrix.values, matrix.index, matrix.scales
    return matrix.data, matrix.scales, matrix.offsets


def _kind(matrix: Matrix) -> tuple[int, int, int]:
    """Its number, and the tile and index kind of a balanced weight. ValueError for one in another layout."""
    if not isinstance(matrix, BalancedWeight):
        return KINDS.index(matrix.dtype), 0, 0
    if matrix.spec.layout != "lanes":
        raise ValueError(f"a balanced weight of the stack must be in the lanes layout, not {matrix.spec.layout}")
    return len(KINDS), matrix.spec.tile, INDEX_KINDS.index(matrix.spec.index_kind)


def _or_empty(tensor: torch.Tensor | None) -> torch.Tensor:
    return torch.empty(0) if tensor is None else tensor.float()
