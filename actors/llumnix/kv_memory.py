"""The KV pool of an instance and the transports that can move blocks out of it, chosen by where the pool lies."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actors.llumnix.migration.transport.base import KVTransport
from actors.llumnix.migration.transport.shared_memory import SharedMemoryTransport, SharedPool

logger = logging.getLogger("sextant.llumnix.instance")


@dataclass
class KVMemory:
    """``kv``: the pool ``[num_blocks, layers, 2, kv_heads, head_dim * block_size]``. Empty ``transports``: nothing migrates."""

    kv: torch.Tensor
    num_blocks: int
    block_bytes: int
    transports: Sequence[KVTransport]
    pool: SharedPool | None

    def close(self) -> None:
        """Take the pool off the system; the memory goes with its last user."""
        if self.pool is not None:
            self.pool.close()


def allocate(model: Any, memory_mib: int, block_size: int, names: Sequence[str]) -> KVMemory:
    """As many blocks of ``model`` as fit ``memory_mib``; on a CPU in shared memory, with the transports of ``names``.

    Raises TransportError when there is not so much shared memory, ValueError when not one block fits.
    """
    block_bytes = model.kv_bytes_per_block(block_size)
    num_blocks = (memory_mib << 20) // block_bytes
    if num_blocks < 1 or model.device.type != "cpu":
        return KVMemory(model.new_kv(num_blocks), num_blocks, block_bytes, (), None)
    pool = SharedPool.create(num_blocks * block_bytes)
    transports: list[KVTransport] = []
    for name in names:
        transport = _make(name, pool, block_bytes)
        if transport is not None:
            transports.append(transport)
    return KVMemory(model.new_kv(num_blocks, pool.tensor), num_blocks, block_bytes, transports, pool)


def _make(name: str, pool: SharedPool, block_bytes: int) -> KVTransport | None:
    if name == "shared_memory":
        return SharedMemoryTransport(pool, block_bytes)
    return None
