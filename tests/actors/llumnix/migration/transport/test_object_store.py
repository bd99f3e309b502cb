"""The object store as a KV transport, between this process and an actor's, in a local Ray."""

from __future__ import annotations

import pickle

import pytest
import torch

from actors.llumnix.migration.transport.base import TransportError
from actors.llumnix.migration.transport.object_store import ObjectStoreTransport

BLOCKS, BLOCK_BYTES = 12, 100_000


def contents(seed: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (BLOCKS, BLOCK_BYTES), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


class Source:
    """Owns the pool that is copied from, in a process of its own."""

    def __init__(self) -> None:
        self.transport = ObjectStoreTransport(contents(1), chunk_bytes=3 * BLOCK_BYTES)

    def endpoint(self) -> str:
        return self.transport.endpoint()

    def offer(self, ids: list[int]) -> bytes:
        return pickle.dumps(self.transport.offer(ids))  # As the migrators' channel does it.

    def revoke(self, offer: bytes) -> None:
        self.transport.revoke(pickle.loads(offer))


@pytest.mark.cluster
def test_bytes_go_through_the_object_store(ray_local) -> None:
    import ray

    source = ray.remote(Source).options(num_cpus=0).remote()
    blocks = contents(2)
    transport = ObjectStoreTransport(blocks)
    assert transport.reachable(ray.get(source.endpoint.remote()))
    assert not transport.reachable("") and not transport.reachable(None)
    src, dst = [3, 4, 0, 11, 7, 6, 5], [1, 2, 3, 9, 8, 0, 10]
    packed = ray.get(source.offer.remote(src))
    offer = pickle.loads(packed)
    assert transport.probe(offer) == offer.nbytes and torch.equal(blocks, contents(2))
    assert transport.fetch(offer, dst) == offer.nbytes == len(src) * BLOCK_BYTES
    want = contents(2)
    want[dst] = contents(1)[src]
    assert torch.equal(blocks, want)
    ray.get(source.revoke.remote(packed))
    ray.get(source.revoke.remote(packed))  # Twice is harmless.
    with pytest.raises(TransportError, match="outside the pool"):
        transport.fetch(offer, [BLOCKS] * len(src))
    ray.kill(source)
