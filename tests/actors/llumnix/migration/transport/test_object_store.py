"""The object store as a KV transport, between this process and an actor's, in a small local Ray."""

from __future__ import annotations

import pytest
import torch

from actors.llumnix.migration.transport.base import OfferRevoked, TransportError

BLOCKS, BLOCK_BYTES = 12, 4096


def contents(seed: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (BLOCKS, BLOCK_BYTES), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.cluster
def test_bytes_go_through_the_object_store() -> None:
    import ray

    from actors.llumnix.migration.transport.object_store import ObjectStoreTransport

    assert ObjectStoreTransport(contents(1)).endpoint() == ""  # No Ray yet.
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:

        @ray.remote(num_cpus=0)
        class Source:
            def __init__(self, blocks):
                self.transport = ObjectStoreTransport(torch.from_numpy(blocks.copy()), chunk_bytes=3 * BLOCK_BYTES)

            def endpoint(self):
                return self.transport.endpoint()

            def offer(self, ids):
                offer = self.transport.offer(ids)
                return offer.num_blocks, offer.block_bytes, offer.payload, offer.transport

            def revoke(self, offer):
                self.transport.revoke(offer)

        from actors.llumnix.migration.transport.base import Offer

        source = Source.remote(contents(1).numpy())
        blocks = contents(2)
        transport = ObjectStoreTransport(blocks)
        assert transport.reachable(ray.get(source.endpoint.remote())) and not transport.reachable("")
        src, dst = [3, 4, 0, 11, 7, 6, 5], [1, 2, 3, 9, 8, 0, 10]
        num, nbytes, payload, name = ray.get(source.offer.remote(src))
        offer = Offer(name, num, nbytes, payload)
        assert transport.fetch(offer, dst) == offer.nbytes == len(src) * BLOCK_BYTES
        want = contents(2)
        want[dst] = contents(1)[src]
        assert torch.equal(blocks, want)
        ray.get(source.revoke.remote(offer))
        with pytest.raises((OfferRevoked, TransportError)):
            transport.fetch(offer, dst)
        with pytest.raises(TransportError, match="outside the pool"):
            transport.fetch(offer, [BLOCKS] * len(src))
    finally:
        ray.shutdown()
