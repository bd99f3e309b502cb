"""The model of one engine: weights in one of three forms, one ``forward`` over the paged KV pool. Called by engine.py.

Paths: ``cpp`` (kernels.decoder: the CPU's default, bit-exact across batches, chunks and threads), ``torch`` (any CPU, no
compiler needed, slower, not bit-exact across batches), ``cuda`` (torch matrices, Triton attention, CUDA graphs).
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch

from actors.llumnix.engine.batch import ModelBatch
from actors.llumnix.engine.model_config import ModelConfig
from actors.llumnix.engine.model_torch import TorchDecoder

ModelPath = Literal["cpp", "torch", "cuda"]
BLOCK_SIZE = 16
"""Positions in a KV block; the kernels' layouts are made for it."""
_KV_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Decoder(Protocol):
    """What a path provides: model_torch.TorchRunner, model_cpp.CppRunner, model_cuda.CudaRunner."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step of one token reads."""
        ...

    def run(self, batch: ModelBatch, kv: torch.Tensor) -> torch.Tensor:
        """Logits fp32 [R, vocab] of the batch's rows."""
        ...


class Model:
    """A loaded model. Build it with ``loading.load_model``.

    ``numerics`` names everything that decides the bits of a result: two models of equal numerics give equal bits (on the
    ``cpp`` path and on the deterministic ``cuda`` one; on the others they give equal bits for equal batches).
    """

    def __init__(
        self,
        config: ModelConfig,
        decoder: Decoder,
        path: ModelPath,
        dtype: str,
        kv_dtype: str,
        device: torch.device,
        numerics: str,
    ):
        self.config = config
        self.path: ModelPath = path
        self.dtype, self.kv_dtype, self.device = dtype, kv_dtype, device
        self.numerics = numerics
        self.eos_token_ids = config.eos_token_ids
        self._decoder = decoder

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step of one token reads."""
        return self._decoder.weight_bytes

    def kv_bytes_per_block(self, block_size: int = BLOCK_SIZE) -> int:
        """Bytes of one block of all layers: layers x 2 x kv_heads x head_dim x block_size x element size."""
        c = self.config
        return c.num_layers * 2 * c.kv_size * block_size * _KV_DTYPES[self.kv_dtype].itemsize

    def new_kv(self, num_blocks: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """A zeroed pool ``[num_blocks, layers, 2, kv_heads, head_dim * 16]`` on the model's device.

        ``buffer`` is memory to place it in: uint8 [at least num_blocks * kv_bytes_per_block()], on the same device. ValueError
        if it is too small or elsewhere.
        """
        c = self.config
        if num_blocks < 1:
            raise ValueError("the KV memory holds not even one block: raise kv_memory_mib")
        shape = (num_blocks, c.num_layers, 2, c.num_kv_heads, c.head_dim * BLOCK_SIZE)
        dtype = _KV_DTYPES[self.kv_dtype]
        if buffer is None:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        nbytes = num_blocks * self.kv_bytes_per_block()
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.numel() < nbytes:
            raise ValueError(f"the KV pool needs a buffer of {nbytes:,} bytes (uint8), and got {tuple(buffer.shape)}")
        if buffer.device.type != self.device.type:
            raise ValueError(f"the KV pool belongs on {self.device}, and the buffer is on {buffer.device}")
        return buffer[:nbytes].view(dtype).view(shape).zero_()

    def forward(self, batch: ModelBatch, kv: torch.Tensor) -> torch.Tensor:
        """Logits fp32 [R, vocab] of ``batch.logits_rows_R``; writes the keys and values of all T tokens into ``kv``.

        The result is valid until the next call (CUDA graphs write into one buffer).
        """
        return self._decoder.run(batch, kv)


class TorchRunner:
    """The ``torch`` path: a TorchDecoder fed with CPU tensors."""

    def __init__(self, decoder: TorchDecoder):
        self._decoder = decoder

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step of one token reads."""
        return self._decoder.weight_bytes

    def run(self, batch: ModelBatch, kv: torch.Tensor) -> torch.Tensor:
        """See ``Decoder``."""
        return self._decoder.forward(
            batch.token_ids_T,
            batch.positions_T,
            batch.query_start,
            batch.context_len_S,
            batch.block_table_SN,
            batch.logits_rows_R,
            kv,
        )
