"""KV blocks through Ray's object store: the fallback where instances share no memory and gloo finds no way. Copies twice.

The only module of migration that imports Ray, and only when it is used.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch

from actors.llumnix.migration.transport.base import UNPACED, Offer, OfferRevoked, Pace, TransportError, check_ids

log = logging.getLogger(__name__)

CHUNK_BYTES = 16 << 20
GET_TIMEOUT_S = 10.0


class ObjectStoreTransport:
    """``blocks``: the pool as uint8 ``[num_blocks, block_bytes]`` on any device. Ray must be initialised in this process."""

    name = "object_store"

    def __init__(self, blocks: torch.Tensor, chunk_bytes: int = CHUNK_BYTES):
        if blocks.dtype != torch.uint8 or blocks.dim() != 2:
            raise TransportError("the object store moves a pool of uint8 [num_blocks, block_bytes]")
        self._blocks = blocks
        self._block_bytes = blocks.shape[1]
        self._chunk_blocks = max(1, chunk_bytes // self._block_bytes)
        self._refs: dict[bytes, list[Any]] = {}
        self._lock = threading.Lock()

    def endpoint(self) -> str:
        """The cluster that we are in; empty outside of one."""
        import ray

        return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else ""

    def reachable(self, endpoint: Any) -> bool:
        """Whether the peer is in the same Ray cluster."""
        return isinstance(endpoint, str) and bool(endpoint) and endpoint == self.endpoint()

    def offer(self, block_ids: Sequence[int], endpoint: Any = None) -> Offer:
        """Copy the blocks into the object store, in chunks."""
        import ray
        from ray import cloudpickle

        ids = check_ids(block_ids, len(self._blocks))
        refs = []
        for start in range(0, len(ids), self._chunk_blocks):
            part = torch.tensor(ids[start : start + self._chunk_blocks], dtype=torch.long)
            refs.append(ray.put(self._blocks[part].cpu().numpy()))
        payload = cloudpickle.dumps(refs)
        with self._lock:
            self._refs[payload] = refs
        return Offer(self.name, len(ids), self._block_bytes, payload)

    def revoke(self, offer: Offer) -> None:
        """Free the chunks: references that travelled in a message are pinned by Ray until they are freed by name.

        The store holds copies, so whoever still reads them reads what was offered.
        """
        with self._lock:
            refs = self._refs.pop(offer.payload, None)
        if refs:
            _free(refs)

    def fetch(self, offer: Offer, dst_block_ids: Sequence[int], pace: Pace = UNPACED) -> int:
        """Copy the chunks out of the store (fetched from the other node first)."""
        ids = check_ids(dst_block_ids, len(self._blocks))
        if len(ids) != offer.num_blocks:
            raise TransportError(f"{offer.num_blocks} blocks were offered for {len(ids)}")
        return self._get(offer, self._blocks, ids, pace)

    def probe(self, offer: Offer) -> int:
        """See KVTransport."""
        scratch = torch.empty((offer.num_blocks, self._block_bytes), dtype=torch.uint8)
        return self._get(offer, scratch, range(offer.num_blocks), UNPACED)

    def close(self) -> None:
        """Free what is still offered."""
        with self._lock:
            refs = [ref for chunk in self._refs.values() for ref in chunk]
            self._refs.clear()
        if refs:
            _free(refs)

    def _get(self, offer: Offer, target: torch.Tensor, ids: Sequence[int], pace: Pace) -> int:
        import ray
        from ray import cloudpickle, exceptions

        if offer.block_bytes != self._block_bytes:
            raise TransportError(f"the peer's blocks have {offer.block_bytes} bytes, ours {self._block_bytes}")
        at = 0
        for ref in cloudpickle.loads(offer.payload):
            pace.before()
            try:
                chunk = ray.get(ref, timeout=GET_TIMEOUT_S)
            except (exceptions.ObjectFreedError, exceptions.ObjectLostError) as error:
                raise OfferRevoked("the source took its offer back") from error
            except exceptions.RayError as error:
                raise TransportError(f"the object store did not deliver: {str(error).splitlines()[0]}") from error
            part = torch.tensor(list(ids[at : at + len(chunk)]), dtype=torch.long)
            # The array lies read-only in the store: copied before torch sees it.
            target[part] = torch.from_numpy(chunk.copy()).to(target.device)
            at += len(chunk)
            pace.after()
        return offer.nbytes


def _free(refs: list[Any]) -> None:
    """Undo the reference that Ray adds for good when a reference is pickled outside of a task's arguments.

    The one use of a private part of Ray here; should a new Ray move it, the objects stay until this process ends.
    """
    try:
        from ray._private.worker import global_worker

        for ref in refs:
            global_worker.core_worker.remove_object_ref_reference(ref)  # type: ignore[attr-defined]
    except Exception as error:  # A moved function, or a cluster that is going down.
        log.warning("Ray's object store could not free %d objects: %s", len(refs), error)
