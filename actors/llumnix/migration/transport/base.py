"""What every KV transport can do: the source offers blocks of its pool, the destination fetches them into its own.

Stands between the migrator (which decides which blocks move) and the bytes. A pool is seen here as ``uint8
[num_blocks, block_bytes]``: a block of all layers is one contiguous run of bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class TransportError(RuntimeError):
    """Blocks could not be copied; what arrived is worthless. Says why in a sentence."""


class OfferRevoked(TransportError):
    """The source took the offer back (it goes on alone, or its request ended): its blocks may already hold something else."""


@dataclass(frozen=True)
class Offer:
    """Blocks that a peer may read until the offer is revoked. Picklable; ``payload`` is the transport's own."""

    transport: str
    num_blocks: int
    block_bytes: int
    payload: Any

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.block_bytes


class Pace:
    """Leaves memory bandwidth and the core to the engines: after each slice sleeps so that copying takes ``duty`` of the time.

    ``cancelled`` is asked before every slice; a true answer ends the copy with OfferRevoked. ``duty=1`` never sleeps.
    """

    def __init__(self, duty: float = 1.0, cancelled: Callable[[], bool] | None = None):
        if not 0 < duty <= 1:
            raise ValueError(f"the duty of a paced copy must be in (0, 1], not {duty}")
        self.duty = duty
        self._cancelled = cancelled
        self._debt_s = 0.0
        self._started: float | None = None

    def before(self) -> None:
        """Call before a slice. Raises OfferRevoked when the copy was cancelled."""
        if self._cancelled is not None and self._cancelled():
            raise OfferRevoked("the copy was cancelled")
        self._started = time.perf_counter()

    def after(self) -> None:
        """Call after a slice; sleeps when enough is owed."""
        if self.duty == 1.0 or self._started is None:
            return
        self._debt_s += (time.perf_counter() - self._started) * (1 / self.duty - 1)
        if self._debt_s >= 0.001:  # Shorter sleeps cost more in wake-ups than they give back.
            time.sleep(self._debt_s)
            self._debt_s = 0.0


UNPACED = Pace()


class KVTransport(Protocol):
    """One way to move blocks between two pools. Thread-safe."""

    name: str

    def endpoint(self) -> Any:
        """What a peer must know to use this transport with us (picklable); part of our PeerAddress."""

    def reachable(self, endpoint: Any) -> bool:
        """Whether a peer with that endpoint and we can use this transport. Quick; never raises."""

    def offer(self, block_ids: Sequence[int], endpoint: Any) -> Offer:
        """Source: let the peer with that endpoint read these blocks of our pool. They must stay referenced until ``revoke``."""

    def revoke(self, offer: Offer) -> None:
        """Source: the blocks may change from now on; a fetch that has not ended will fail. Idempotent."""

    def fetch(self, offer: Offer, dst_block_ids: Sequence[int], pace: Pace = UNPACED) -> int:
        """Destination: copy the offered blocks into these blocks of our pool; returns bytes. Raises TransportError."""

    def probe(self, offer: Offer) -> int:
        """Destination: fetch into a scratch buffer, to measure; returns bytes. Raises TransportError."""

    def close(self) -> None:
        """Free what the transport holds. Idempotent."""


def runs(source: Sequence[int], destination: Sequence[int], max_blocks: int) -> Iterator[tuple[int, int, int]]:
    """Coalesce pairs of block ids into (source, destination, count) that are consecutive in both, at most ``max_blocks`` each."""
    if len(source) != len(destination):
        raise ValueError(f"{len(source)} source blocks and {len(destination)} destination blocks do not pair up")
    start = 0
    for i in range(1, len(source) + 1):
        if (
            i == len(source)
            or source[i] != source[i - 1] + 1
            or destination[i] != destination[i - 1] + 1
            or i - start == max_blocks
        ):
            yield source[start], destination[start], i - start
            start = i


def check_ids(block_ids: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """The ids as plain ints; raises TransportError if one is not in a pool of ``num_blocks``."""
    ids = tuple(int(i) for i in block_ids)
    if ids and not (min(ids) >= 0 and max(ids) < num_blocks):
        raise TransportError(f"a block id is outside the pool of {num_blocks} blocks: {min(ids)} ... {max(ids)}")
    return ids
