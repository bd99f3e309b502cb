"""Which transports an instance offers, given what it has: shared memory for its host, gloo for other nodes, Ray's store."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from actors.llumnix.migration.transport.base import KVTransport, TransportError
from actors.llumnix.migration.transport.shared_memory import SharedMemoryTransport, SharedPool

log = logging.getLogger(__name__)


def make_transports(
    kv: torch.Tensor, pool: SharedPool | None, host: str | None, names: Sequence[str] = ("shared_memory", "gloo")
) -> list[KVTransport]:
    """Transports for the KV pool ``kv [num_blocks, ...]`` (contiguous), in the order of ``names``; what cannot work is left out.

    Shared memory needs ``pool``, the memory under ``kv``; gloo needs ``host``, our address on the network; the object store
    needs an initialised Ray. Raises TransportError if nothing is left, or for an unknown name.
    """
    if not kv.is_contiguous():
        raise TransportError("the KV pool must be contiguous")
    blocks = kv.view(kv.shape[0], -1).view(torch.uint8)
    made: list[KVTransport] = []
    for name in names:
        try:
            if name == "shared_memory":
                if pool is not None:
                    made.append(SharedMemoryTransport(pool, blocks.shape[1]))
            elif name == "gloo":
                if host is not None:
                    from actors.llumnix.migration.transport.gloo import GlooTransport

                    made.append(GlooTransport(blocks, host))
            elif name == "object_store":
                from actors.llumnix.migration.transport.object_store import ObjectStoreTransport

                store = ObjectStoreTransport(blocks)
                if store.endpoint():
                    made.append(store)
            else:
                raise TransportError(f"unknown KV transport {name!r}: shared_memory, gloo or object_store")
        except (ImportError, RuntimeError) as error:
            if isinstance(error, TransportError) and "unknown" in str(error):
                raise
            log.warning("KV transport %s is not available: %s", name, error)
    if not made:
        raise TransportError("no KV transport is available: requests cannot migrate")
    return made
