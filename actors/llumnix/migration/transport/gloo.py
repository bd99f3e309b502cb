"""KV blocks between nodes over torch.distributed's gloo: one process group a pair of instances, made when first needed.

The destination pulls: it announces in the source's store which offer it wants, and the source's sender thread for that peer
sends the blocks in chunks, fused in a contiguous staging buffer (as in the paper's implementation). Every chunk says whether
the offer still held when its blocks were read, so a late reader never takes rubbish for keys and values.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from actors.llumnix.migration.transport.base import UNPACED, Offer, OfferRevoked, Pace, TransportError, check_ids

log = logging.getLogger(__name__)

CHUNK_BYTES = 4 << 20
STATUS_BYTES = 8
IDLE_POLL_S = 0.0005
OPERATION_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class GlooEndpoint:
    """Where an instance's store listens; ``uid`` tells a restarted instance from the one before."""

    host: str
    port: int
    uid: str


@dataclass
class _Job:
    number: int
    block_ids: tuple[int, ...]
    sent: int = 0
    wanted: bool = False
    revoked: bool = False


class _Sender:
    """The source's side of one pair: a thread that serves wanted offers, the one with the least left first."""

    def __init__(self, transport: GlooTransport, peer: GlooEndpoint, generation: int):
        self.name = f"{transport.own.uid}-{peer.uid}-{generation}"
        self.failure: str | None = None
        self._transport = transport
        self._peer = peer
        self._jobs: dict[int, _Job] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._store = dist.PrefixStore(self.name, transport.store)
        self._thread = threading.Thread(target=self._run, name=f"gloo-send-{peer.uid[:6]}", daemon=True)
        self._thread.start()

    def add(self, job: _Job) -> None:
        with self._wake:
            self._jobs[job.number] = job
            self._wake.notify()

    def revoke(self, number: int) -> None:
        """On return the sender reads the offer's blocks no more."""
        with self._wake:
            job = self._jobs.get(number)
            if job is not None:
                job.revoked = True
                if not job.wanted:
                    del self._jobs[number]
                self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()

    def _run(self) -> None:
        try:
            group: Any = None
            while True:
                job = self._next()
                if job is None:
                    return
                if group is None:  # Only now, because the peer joins when it first wants something.
                    group = self._transport.join(self._store, rank=0)
                self._send_chunk(group, job)
        except Exception as error:  # A dead peer, a time-out; the group cannot be used any more.
            if not self._closed:
                log.warning("gloo to %s:%d failed: %s", self._peer.host, self._peer.port, error)
            with self._wake:
                self.failure = str(error)
                self._closed = True
                self._jobs.clear()

    def _next(self) -> _Job | None:
        """A wanted offer with the least left to send; waits for one. None when closed."""
        with self._wake:
            while not self._closed:
                for job in self._jobs.values():
                    job.wanted = job.wanted or self._store.check([f"want-{job.number}"])
                wanted = [job for job in self._jobs.values() if job.wanted]
                if wanted:
                    return min(wanted, key=lambda job: len(job.block_ids) - job.sent)
                self._wake.wait(IDLE_POLL_S if self._jobs else None)
        return None

    def _send_chunk(self, group: Any, job: _Job) -> None:
        transport = self._transport
        ids = job.block_ids[job.sent : job.sent + transport.chunk_blocks]
        buffer = torch.zeros(STATUS_BYTES + len(ids) * transport.block_bytes, dtype=torch.uint8)
        with self._wake:  # ``revoke`` waits for this copy, and no later one reads.
            if job.revoked:
                buffer[0] = 1
            else:
                rows = transport.blocks[torch.tensor(ids, dtype=torch.long)]
                buffer[STATUS_BYTES:] = rows.reshape(-1).cpu()
        group.send([buffer], 1, job.number).wait()
        job.sent += len(ids)
        if job.sent >= len(job.block_ids) or buffer[0]:
            with self._wake:
                self._jobs.pop(job.number, None)
            with contextlib.suppress(RuntimeError):
                self._store.delete_key(f"want-{job.number}")


@dataclass
class _Receiver:
    """The destination's side of one pair. Several offers are received at the same time, told apart by their tags: the sender
    may serve either, so neither may wait for the other."""

    store: Any
    group: Any


class GlooTransport:
    """``blocks``: the pool as uint8 ``[num_blocks, block_bytes]`` on any device. ``host``: our address on the network.

    The rendezvous store and gloo's sockets carry no authentication: use on a private network, as torch.distributed itself.
    """

    name = "gloo"

    def __init__(self, blocks: torch.Tensor, host: str, chunk_bytes: int = CHUNK_BYTES):
        if blocks.dtype != torch.uint8 or blocks.dim() != 2:
            raise TransportError("gloo moves a pool of uint8 [num_blocks, block_bytes]")
        self.blocks = blocks
        self.block_bytes = blocks.shape[1]
        self.chunk_blocks = max(1, chunk_bytes // self.block_bytes)
        try:
            self.store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            self._device = dist.ProcessGroupGloo.create_device(hostname=host)
        except RuntimeError as error:
            raise TransportError(f"gloo cannot listen on {host}: {str(error).splitlines()[0]}") from error
        self.own = GlooEndpoint(host, self.store.port, secrets.token_hex(8))
        self._numbers = itertools.count(1)
        self._generations = itertools.count(1)
        self._senders: dict[GlooEndpoint, _Sender] = {}
        self._receivers: dict[str, _Receiver] = {}
        self._lock = threading.Lock()

    def endpoint(self) -> GlooEndpoint:
        """Where our store listens."""
        return self.own

    def reachable(self, endpoint: Any) -> bool:
        """Any peer that speaks gloo, for all we know; measuring tells."""
        return isinstance(endpoint, GlooEndpoint) and endpoint != self.own

    def offer(self, block_ids: Sequence[int], endpoint: Any) -> Offer:
        """Queue the blocks for the peer; they are read when it asks."""
        ids = check_ids(block_ids, len(self.blocks))
        if not isinstance(endpoint, GlooEndpoint):
            raise TransportError("the peer does not speak gloo")
        with self._lock:
            sender = self._senders.get(endpoint)
            if sender is None or sender.failure is not None:
                sender = self._senders[endpoint] = _Sender(self, endpoint, next(self._generations))
        number = next(self._numbers)
        sender.add(_Job(number, ids))
        return Offer(
            self.name, len(ids), self.block_bytes, (self.own, sender.name, number, endpoint, self.chunk_blocks)
        )

    def revoke(self, offer: Offer) -> None:
        """See KVTransport."""
        _, _, number, endpoint, _ = offer.payload
        with self._lock:
            sender = self._senders.get(endpoint)
        if sender is not None:
            sender.revoke(number)

    def fetch(self, offer: Offer, dst_block_ids: Sequence[int], pace: Pace = UNPACED) -> int:
        """Ask for the offer and receive it chunk by chunk. A cancelled copy still drains what was sent."""
        ids = check_ids(dst_block_ids, len(self.blocks))
        if len(ids) != offer.num_blocks:
            raise TransportError(f"{offer.num_blocks} blocks were offered for {len(ids)}")
        return self._receive(offer, self.blocks, ids, pace)

    def probe(self, offer: Offer) -> int:
        """See KVTransport."""
        scratch = torch.empty((offer.num_blocks, self.block_bytes), dtype=torch.uint8)
        return self._receive(offer, scratch, range(offer.num_blocks), UNPACED)

    def close(self) -> None:
        """End the sender threads and drop the groups."""
        with self._lock:
            for sender in self._senders.values():
                sender.close()
            self._senders.clear()
            self._receivers.clear()

    def join(self, store: Any, rank: int) -> Any:
        """A process group of two over ``store``. Raises RuntimeError."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [self._device]
        options._timeout = timedelta(seconds=OPERATION_TIMEOUT_S)
        return dist.ProcessGroupGloo(store, rank, 2, options)

    def _receive(self, offer: Offer, target: torch.Tensor, ids: Sequence[int], pace: Pace) -> int:
        if offer.block_bytes != self.block_bytes:
            raise TransportError(f"the peer's blocks have {offer.block_bytes} bytes, ours {self.block_bytes}")
        source, pair, number, _, chunk_blocks = offer.payload
        try:
            receiver = self._receiver(source, pair, number)
            self._receive_chunks(receiver, number, target, ids, chunk_blocks, pace)
        except RuntimeError as error:
            if isinstance(error, TransportError):
                raise
            with self._lock:
                self._receivers.pop(pair, None)
            raise TransportError(f"gloo from {source.host}:{source.port}: {str(error).splitlines()[0]}") from error
        return offer.nbytes

    def _receive_chunks(
        self, receiver: _Receiver, number: int, target: torch.Tensor, ids: Sequence[int], chunk_blocks: int, pace: Pace
    ) -> None:
        cancelled: OfferRevoked | None = None
        for start in range(0, len(ids), chunk_blocks):
            part = list(ids[start : start + chunk_blocks])
            buffer = torch.empty(STATUS_BYTES + len(part) * self.block_bytes, dtype=torch.uint8)
            if cancelled is None:
                try:
                    pace.before()
                except OfferRevoked as error:
                    cancelled = error
            receiver.group.recv([buffer], 0, number).wait()
            if buffer[0]:
                raise OfferRevoked("the source took its offer back")
            if cancelled is None:
                rows = buffer[STATUS_BYTES:].view(len(part), self.block_bytes)
                target[torch.tensor(part, dtype=torch.long)] = rows.to(target.device)
                pace.after()
        if cancelled is not None:
            raise cancelled

    def _receiver(self, source: GlooEndpoint, pair: str, number: int) -> _Receiver:
        """Our side of the pair, made at the first call; announces that offer ``number`` is wanted."""
        with self._lock:
            receiver = self._receivers.get(pair)
        if receiver is not None:
            receiver.store.set(f"want-{number}", "1")
            return receiver
        client = dist.TCPStore(
            source.host, source.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10)
        )
        store = dist.PrefixStore(pair, client)
        store.set(f"want-{number}", "1")  # First, because this is what makes the source join.
        receiver = _Receiver(store, self.join(store, rank=1))
        with self._lock:
            return self._receivers.setdefault(pair, receiver)
