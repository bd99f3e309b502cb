"""The ``cuda`` path: torch matrices, Triton paged attention, and CUDA graphs for decode steps.

A decode step of a small model is hundreds of short kernels, so launching them costs more than running them; a graph replays
all of them with one launch. Graphs are captured at their first use for bucketed batch sizes; a smaller batch runs in the next
larger bucket, its padding being tokens that belong to no sequence.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actors.llumnix.engine.batch import ModelBatch
from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.model_torch import AttentionBackend, TorchDecoder
from actors.llumnix.engine.weights.source import WeightSource

log = logging.getLogger(__name__)

_BLOCK_SIZE = 16
_WARM_UPS = 2
"""Runs before a capture: Triton compiles and cuBLAS allocates its workspace in them, which a capture must not see."""


def buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes that have a graph: 1, 2, 4, then multiples of 8, up to the first that holds ``max_num_seqs``."""
    sizes = [1, 2, 4, *range(8, max_num_seqs + 8, 8)]
    return tuple(s for i, s in enumerate(sizes) if i == 0 or sizes[i - 1] < max_num_seqs)


class DecodeInputs:
    """The inputs of a decode step of up to ``size`` sequences, packed into one int32 array so that one copy moves them.

    Padding: tokens past the batch belong to no sequence (``query_start`` stays at the number of real tokens), so that they
    write no key, attend to nothing, and cost only their rows of the matrices.
    """

    def __init__(self, size: int, num_table_columns: int, device: torch.device):
        self.size, self.columns = size, num_table_columns
        total = 4 * size + 1 + size * num_table_columns
        self._host = torch.zeros(total, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        host = self._host.numpy()
        self._token_ids, self._positions, self._context_len = (host[i * size : (i + 1) * size] for i in range(3))
        self._query_start = host[3 * size : 4 * size + 1]
        self._table = host[4 * size + 1 :].reshape(size, num_table_columns)
        parts = self._device
        self.token_ids_T, self.positions_T, self.context_len_S = (parts[i * size : (i + 1) * size] for i in range(3))
        self.query_start = parts[3 * size : 4 * size + 1]
        self.block_table_SN = parts[4 * size + 1 :].view(size, num_table_columns)
        self.rows_R = torch.arange(size, device=device)

    def fill(self, batch: ModelBatch) -> None:
        """Copy a batch of at most ``size`` decodes in; the device's copy is ordered before what is launched next."""
        if self._copied is not None:
            self._copied.synchronize()  # The last copy may still read the host's array.
        count, columns = batch.block_table_SN.shape
        self._token_ids[:count] = batch.token_ids_T.numpy()
        self._positions[:count] = batch.positions_T.numpy()
        self._context_len[:count] = batch.context_len_S.numpy()
        self._token_ids[count:] = self._positions[count:] = self._context_len[count:] = 0
        self._query_start[: count + 1] = np.arange(count + 1)
        self._query_start[count + 1 :] = count
        self._table[:count, :columns] = batch.block_table_SN.numpy()
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: DecodeInputs
    logits: torch.Tensor


def is_decode(batch: ModelBatch) -> bool:
    """Whether every sequence brings one token and wants its logits."""
    count = batch.context_len_S.numel()
    return batch.token_ids_T.numel() == count and batch.logits_rows_R.numel() == count


class CudaRunner:
    """A TorchDecoder on a GPU with graphs. ``device`` may be a CPU and ``graphs`` off to run it in Triton's interpreter."""

    def __init__(
        self,
        source: WeightSource,
        config: EngineConfig,
        device: torch.device,
        max_model_len: int,
        attention: AttentionBackend = "triton",
    ):
        """Reads the weights onto the device. ModelLoadError."""
        self._decoder = TorchDecoder(
            source.config, source, config.dtype, device, max_model_len, attention, config.deterministic
        )
        self._device = device
        self._use_graphs = config.cuda_graphs and device.type == "cuda"
        self._buckets = buckets(config.max_num_seqs)
        self._columns = -(-max_model_len // _BLOCK_SIZE)
        self._graphs: dict[int, _Graph] = {}
        self._pool: Any = None
        self._captured_kv: torch.Tensor | None = None
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
        mode = "deterministic" if config.deterministic else "fast"
        self.numerics = f"cuda-{name}-torch-{torch.__version__}-{mode}".replace(" ", "_")

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step of one token reads."""
        return self._decoder.weight_bytes

    def run(self, batch: ModelBatch, kv: torch.Tensor) -> torch.Tensor:
        """See ``Decoder``; the logits are on the device and valid until the next call."""
        if self._use_graphs and is_decode(batch):
            size = next((b for b in self._buckets if b >= batch.context_len_S.numel()), None)
            if size is not None and batch.block_table_SN.shape[1] <= self._columns:
                return self._replay(size, batch, kv)
        return self._eager(batch, kv)

    def _eager(self, batch: ModelBatch, kv: torch.Tensor) -> torch.Tensor:
        # The engine writes its next batch into the arrays of this one: the copies must be done when this returns, as
        # blocking ones from pageable memory are.
        return self._decoder.forward(
            batch.token_ids_T.to(self._device),
            batch.positions_T.to(self._device),
            batch.query_start.to(self._device),
            batch.context_len_S.to(self._device),
            batch.block_table_SN.to(self._device),
            batch.logits_rows_R.to(self._device),
            kv,
            max_query_len=int((batch.query_start[1:] - batch.query_start[:-1]).max()),
        )

    def _replay(self, size: int, batch: ModelBatch, kv: torch.Tensor) -> torch.Tensor:
        if self._captured_kv is not kv:  # A graph is tied to the addresses that it was captured with.
            self._graphs.clear()
            self._captured_kv = kv
        captured = self._graphs.get(size)
        if captured is None:
            captured = self._graphs[size] = self._capture(size, batch, kv)
        captured.inputs.fill(batch)
        captured.graph.replay()
        return captured.logits[: batch.context_len_S.numel()]

    def _capture(self, size: int, batch: ModelBatch, kv: torch.Tensor) -> _Graph:
        inputs = DecodeInputs(size, self._columns, self._device)
        inputs.fill(batch)
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):  # Writes the batch's keys and values, as the replay will: harmless.
                self._step(inputs, kv)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._step(inputs, kv)
        self._pool = graph.pool()  # All graphs share their scratch memory: only one runs at a time.
        log.info("captured the decode graph of batch size %d", size)
        return _Graph(graph, inputs, logits)

    def _step(self, inputs: DecodeInputs, kv: torch.Tensor) -> torch.Tensor:
        """One padded decode step from static inputs."""
        return self._decoder.forward(
            inputs.token_ids_T,
            inputs.positions_T,
            inputs.query_start,
            inputs.context_len_S,
            inputs.block_table_SN,
            inputs.rows_R,
            kv,
            max_query_len=1,
        )

    def run_padded(self, batch: ModelBatch, kv: torch.Tensor) -> torch.Tensor:
        """A decode batch exactly as a graph runs it, without the graph (for tests, and to measure what graphs save)."""
        size = next(b for b in self._buckets if b >= batch.context_len_S.numel())
        inputs = DecodeInputs(size, self._columns, self._device)
        inputs.fill(batch)
        return self._step(inputs, kv)[: batch.context_len_S.numel()]
