"""How fast each KV transport reaches each peer: measured with the peer's help at the first contact, not assumed."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from dataclasses import dataclass
from typing import Any

from actors.llumnix.migration.channel import ChannelError, PeerAddress, PeerConnection
from actors.llumnix.migration.transport.base import KVTransport, Offer, TransportError

log = logging.getLogger(__name__)

PROBE_BLOCKS = 8
PROBE_TIMEOUT_S = 10.0
TYPICAL_BYTES = 64 << 20
"""Size for which ``cost_s`` compares transports: a request of some 1,500 tokens of the demo model."""


@dataclass(frozen=True)
class Probe:
    """Source -> destination: fetch this into memory of no importance, and say how long it took."""

    number: int
    offer: Offer


@dataclass(frozen=True)
class ProbeDone:
    number: int
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class Measurement:
    """One transport to one peer. ``latency_ms`` is that of one block; infinite if the transport failed."""

    peer: str
    transport: str
    latency_ms: float
    gib_per_s: float
    error: str | None = None


class Prober:
    """The table of measurements, and both sides of making it."""

    def __init__(self, transports: dict[str, KVTransport], block_bytes: int):
        self._transports = transports
        self._block_bytes = block_bytes
        self._table: dict[tuple[PeerAddress, str], Measurement] = {}
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[PeerConnection, threading.Event]] = {}
        self._answers: dict[int, ProbeDone] = {}

    def table(self, peer: PeerAddress | None = None) -> tuple[Measurement, ...]:
        """What is known, of one peer or of all."""
        return tuple(row for (address, _), row in self._table.items() if peer is None or address == peer)

    def known(self, peer: PeerAddress, name: str) -> Measurement | None:
        """What is known of one transport to one peer."""
        return self._table.get((peer, name))

    def cost_s(self, peer: PeerAddress, name: str) -> float:
        """Expected seconds for a typical request; infinite if the transport is unknown or failed."""
        row = self._table.get((peer, name))
        if row is None or row.error is not None or not row.gib_per_s:
            return math.inf
        return row.latency_ms / 1e3 + TYPICAL_BYTES / (row.gib_per_s * 2**30)

    def measure(self, connection: PeerConnection, peer: PeerAddress, name: str) -> Measurement:
        """Measure one transport to one peer; best of three. A failure is a row of the table, not an exception."""
        transport = self._transports[name]
        one, many, error = math.inf, math.inf, None
        try:
            self._ask(connection, peer, transport, PROBE_BLOCKS)  # Maps memory, opens connections.
            one = min(self._ask(connection, peer, transport, 1) for _ in range(3))
            many = min(self._ask(connection, peer, transport, PROBE_BLOCKS) for _ in range(3))
        except (TransportError, ChannelError) as failure:
            error = str(failure)
            log.warning("transport %s to instance %s failed: %s", name, peer.instance_id, failure)
        rate = 0.0 if error else PROBE_BLOCKS * self._block_bytes / max(many, 1e-9) / 2**30
        row = Measurement(peer.instance_id, name, one * 1e3, rate, error)
        self._table[peer, name] = row
        return row

    def _ask(self, connection: PeerConnection, peer: PeerAddress, transport: KVTransport, num_blocks: int) -> float:
        number, event = next(self._numbers), threading.Event()
        offer = transport.offer([0] * num_blocks, dict(peer.endpoints).get(transport.name))
        self._waiting[number] = (connection, event)
        try:
            connection.send(Probe(number, offer))
            if not event.wait(PROBE_TIMEOUT_S):
                raise TransportError(f"no answer within {PROBE_TIMEOUT_S:g} s")
            answer = self._answers.pop(number, None)
            if answer is None:
                raise ChannelError("the peer is gone")
            if answer.error is not None:
                raise TransportError(answer.error)
            return answer.seconds
        finally:
            self._waiting.pop(number, None)
            transport.revoke(offer)

    def done(self, answer: ProbeDone) -> None:
        """The peer's answer came in."""
        waiting = self._waiting.get(answer.number)
        if waiting is not None:
            self._answers[answer.number] = answer
            waiting[1].set()

    def lost(self, connection: PeerConnection) -> None:
        """Nobody will answer on this connection any more."""
        for other, event in list(self._waiting.values()):
            if other is connection:
                event.set()

    # ---- the peer's side

    def prepare(self, address: PeerAddress) -> None:
        """A peer has connected: map its memory now, not in the middle of a migration."""
        for name, endpoint in address.endpoints:
            transport: Any = self._transports.get(name)
            if transport is not None and hasattr(transport, "prepare"):
                transport.prepare(endpoint)

    def answer(self, connection: PeerConnection, probe: Probe) -> None:
        """Fetch what is offered and tell how long it took."""
        error = None
        start = time.perf_counter()
        try:
            self._transports[probe.offer.transport].probe(probe.offer)
        except KeyError:
            error = f"transport {probe.offer.transport} is not in use here"
        except TransportError as failure:
            error = str(failure)
        except Exception as failure:
            log.exception("measuring %s failed", probe.offer.transport)
            error = repr(failure)
        try:
            connection.send(ProbeDone(probe.number, time.perf_counter() - start, error))
        except ChannelError as failure:
            log.debug("instance %s: %s", connection.peer_id, failure)
