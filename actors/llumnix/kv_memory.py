"""The KV pool of an instance, in shared memory where it can be, and the transports that can move blocks out of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actors.llumnix.migration.transport.base import KVTransport, TransportError
from actors.llumnix.migration.transport.choice import make_transports
from actors.llumnix.migration.transport.shared_memory import SharedPool

logger = logging.getLogger("sextant.llumnix.instance")


@dataclass
class KVMemory:
    """``kv``: the pool ``[num_blocks, layers, 2, kv_heads, head_dim * block_size]``. Empty ``transports``: nothing migrates."""

    kv: torch.Tensor
    block_bytes: int
    transports: Sequence[KVTransport]
    pool: SharedPool | None

    @property
    def num_blocks(self) -> int:
        return int(self.kv.shape[0])

    def close(self) -> None:
        """Take the pool off the system; the memory goes with its last user."""
        if self.pool is not None:
            self.pool.close()


def allocate(model: Any, memory_mib: int, block_size: int, names: Sequence[str], host: str | None) -> KVMemory:
    """As many blocks of ``model`` as fit ``memory_mib``, with those transports of ``names`` that work here.

    ``host``: address at which other nodes reach this one, None when they need not. Raises TransportError when there is not
    so much shared memory, ValueError when not one block fits.
    """
    block_bytes = model.kv_bytes_per_block(block_size)
    num_blocks = (memory_mib << 20) // block_bytes
    pool = None
    if num_blocks > 0 and model.device.type == "cpu":
        pool = SharedPool.create(num_blocks * block_bytes)
    kv = model.new_kv(num_blocks, None if pool is None else pool.tensor)
    try:
        transports = make_transports(kv, pool, host, names)
    except TransportError as error:
        logger.warning("requests of this instance cannot migrate: %s", error)
        transports = []
    return KVMemory(kv, block_bytes, transports, pool)
