"""KV blocks between processes of one host: the pool lies in anonymous shared memory that peers map and read one-sidedly.

``SharedPool`` is the memory under an instance's KV cache; ``SharedMemoryTransport`` moves blocks out of a peer's pool.
The pool is a ``memfd``: it has no name, is not limited by /dev/shm, and vanishes with its last process. Peers of the same
user open it as ``/proc/<pid>/fd/<fd>``. Where that is not possible the pool is a file in /dev/shm, unlinked by its owner.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import mmap
import os
import secrets
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.llumnix.migration.transport.base import UNPACED, Offer, OfferRevoked, Pace, TransportError, check_ids, runs

log = logging.getLogger(__name__)

LEASE_SLOTS = 512
LEASE_BYTES = LEASE_SLOTS * 8
SLICE_BYTES = 1 << 20
"""Largest copy between two looks at the lease: small enough to stop soon, large enough to run at full bandwidth."""
POPULATE_BYTES = 16 << 20
MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23  # Linux 5.14; not named in Python 3.11.


@functools.cache
def boot_id() -> str:
    """Identifies this boot of this host, whatever container one is in; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def process_start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot (so that a recycled pid is told apart); None if it is not there."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])  # Field 22; the name in parentheses may hold spaces.


@dataclass(frozen=True)
class PoolHandle:
    """Where a peer on the same host finds a pool. Picklable."""

    nbytes: int
    boot_id: str
    pid: int
    start_ticks: int | None
    fd: int
    device: int
    inode: int
    path: str | None = None
    """The file in /dev/shm when the pool is not a memfd."""


class SharedPool:
    """Shared memory that this process owns: ``tensor`` is uint8 ``[nbytes]``, zero-filled. Freed when the last user lets go."""

    def __init__(self, nbytes: int, fd: int, path: str | None):
        self.nbytes = nbytes
        size = _padded(nbytes) + LEASE_BYTES
        try:
            os.ftruncate(fd, size)
            self._map = mmap.mmap(fd, size)
            _advise(self._map, mmap.MADV_HUGEPAGE)
            # Take the pages now: a lack of memory shows at the start, and no page fault falls into a step.
            _populate(self._map, MADV_POPULATE_WRITE)
        except OSError as error:
            if error.errno != 22:  # EINVAL: a kernel before 5.14 takes the pages as they are touched.
                os.close(fd)
                _unlink(path)
                raise TransportError(f"{nbytes / 2**20:.0f} MiB of shared memory for the KV cache: {error}") from error
        stat = os.fstat(fd)
        self.handle = PoolHandle(
            nbytes, boot_id(), os.getpid(), process_start_ticks(os.getpid()), fd, stat.st_dev, stat.st_ino, path
        )
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes)
        self._leases = np.frombuffer(self._map, dtype=np.int64, offset=_padded(nbytes), count=LEASE_SLOTS)
        self._lock = threading.Lock()
        self._free_slots = list(range(LEASE_SLOTS))
        self._tokens = itertools.count(1)
        self._finalizer = weakref.finalize(self, _release, fd, path)

    @classmethod
    def create(cls, nbytes: int, kind: str = "auto") -> SharedPool:
        """``nbytes`` of zero-filled shared memory. ``kind``: ``memfd``, ``file``, or ``auto`` for the first that works.

        Raises TransportError if neither does, or memory is short.
        """
        if nbytes <= 0:
            raise TransportError(f"a KV pool needs a positive number of bytes, not {nbytes}")
        if kind in ("auto", "memfd"):
            try:
                fd = os.memfd_create("sextant-kv", os.MFD_CLOEXEC)
                os.close(os.open(f"/proc/{os.getpid()}/fd/{fd}", os.O_RDONLY))
            except (OSError, AttributeError) as error:
                if kind == "memfd":
                    raise TransportError(f"no anonymous shared memory on this system: {error}") from error
                log.info("no memfd on this system (%s): the KV pool is a file", error)
            else:
                return cls(nbytes, fd, None)
        folder = Path("/dev/shm")
        if not os.access(folder, os.W_OK):
            folder = Path(tempfile.gettempdir())
        path = folder / f"sextant-kv-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TransportError(f"no shared memory for the KV cache: {error}") from error
        return cls(nbytes, fd, str(path))

    @staticmethod
    def open(handle: PoolHandle) -> PeerPool:
        """Map a peer's pool for reading. Raises TransportError if it is on another host, gone, or not what it was."""
        return PeerPool(handle)

    def lease(self) -> tuple[int, int]:
        """A (slot, token) that peers see as valid until ``end_lease``."""
        with self._lock:
            if not self._free_slots:
                raise TransportError(f"more than {LEASE_SLOTS} offers are open")
            slot, token = self._free_slots.pop(), next(self._tokens)
            self._leases[slot] = token
        return slot, token

    def end_lease(self, slot: int, token: int) -> None:
        """Peers that still read under this lease will know that what they read is worthless. Idempotent."""
        with self._lock:
            if self._leases[slot] == token:
                self._leases[slot] = 0
                self._free_slots.append(slot)

    def close(self) -> None:
        """Take the pool off the system: no peer can open it any more. The memory itself goes when the last tensor over it
        and the last peer's mapping are gone. Idempotent."""
        self._finalizer()


class PeerPool:
    """A peer's pool, mapped read-only: a bug here cannot damage the owner. ``bytes`` is uint8 ``[nbytes]``, not writeable."""

    def __init__(self, handle: PoolHandle):
        if handle.boot_id != boot_id() or not handle.boot_id:
            raise TransportError("the peer's KV pool is on another host")
        path = handle.path
        if path is None:
            if process_start_ticks(handle.pid) != handle.start_ticks:
                raise TransportError(f"process {handle.pid}, which owned the KV pool, is gone")
            path = f"/proc/{handle.pid}/fd/{handle.fd}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TransportError(f"the peer's KV pool cannot be opened: {error}") from error
        try:
            stat = os.fstat(fd)
            size = _padded(handle.nbytes) + LEASE_BYTES
            if (stat.st_dev, stat.st_ino) != (handle.device, handle.inode) or stat.st_size < size:
                raise TransportError(f"{path} is not the KV pool that the peer spoke of")
            self._map = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self.handle = handle
        self.bytes = np.frombuffer(self._map, dtype=np.uint8, count=handle.nbytes)
        self._leases = np.frombuffer(self._map, dtype=np.int64, offset=_padded(handle.nbytes), count=LEASE_SLOTS)

    def populate(self) -> None:
        """Build the page tables now, so that no fault falls into the last stage of a migration."""
        with contextlib.suppress(OSError):  # Only a matter of speed.
            _populate(self._map, MADV_POPULATE_READ)

    def lease_valid(self, slot: int, token: int) -> bool:
        """Whether everything read so far under the lease is what the owner offered."""
        return bool(self._leases[slot] == token)


class SharedMemoryTransport:
    """One-sided copies out of the pools of peers on this host. ``pool`` holds ``[num_blocks, block_bytes]``."""

    name = "shared_memory"

    def __init__(self, pool: SharedPool, block_bytes: int):
        if block_bytes <= 0 or pool.nbytes % block_bytes:
            raise TransportError(f"a pool of {pool.nbytes} bytes is no whole number of blocks of {block_bytes} bytes")
        self._pool = pool
        self._block_bytes = block_bytes
        self._blocks = pool.tensor.numpy().reshape(-1, block_bytes)
        self._peers: dict[PoolHandle, PeerPool] = {}
        self._lock = threading.Lock()

    def endpoint(self) -> PoolHandle:
        """The handle of our pool."""
        return self._pool.handle

    def reachable(self, endpoint: Any) -> bool:
        """True when the peer's pool can be opened from here."""
        if not isinstance(endpoint, PoolHandle):
            return False
        with self._lock:
            if endpoint in self._peers and process_start_ticks(endpoint.pid) == endpoint.start_ticks:
                return True
        try:
            PeerPool(endpoint)
        except TransportError as error:
            log.debug("no shared memory with process %d: %s", endpoint.pid, error)
            return False
        return True

    def prepare(self, endpoint: Any) -> None:
        """Map a peer's pool before it is needed; a peer elsewhere is ignored."""
        with contextlib.suppress(TransportError):
            if isinstance(endpoint, PoolHandle):
                self._peer(endpoint)

    def offer(self, block_ids: Sequence[int], endpoint: Any = None) -> Offer:
        """Publish a lease; nothing is copied."""
        ids = check_ids(block_ids, len(self._blocks))
        return Offer(self.name, len(ids), self._block_bytes, (self._pool.handle, ids, *self._pool.lease()))

    def revoke(self, offer: Offer) -> None:
        """End the lease."""
        _, _, slot, token = offer.payload
        self._pool.end_lease(slot, token)

    def fetch(self, offer: Offer, dst_block_ids: Sequence[int], pace: Pace = UNPACED) -> int:
        """Copy block by block, neighbours in one go, without the GIL."""
        return self._copy(offer, check_ids(dst_block_ids, len(self._blocks)), self._blocks, pace)

    def probe(self, offer: Offer) -> int:
        """Copy into memory of our own."""
        scratch = np.empty((max(offer.num_blocks, 1), self._block_bytes), np.uint8)
        return self._copy(offer, range(offer.num_blocks), scratch, UNPACED)

    def close(self) -> None:
        """Let go of the peers' pools. The own pool belongs to whoever made it."""
        with self._lock:
            self._peers.clear()

    def _copy(self, offer: Offer, dst_ids: Sequence[int], target: np.ndarray, pace: Pace) -> int:
        if offer.block_bytes != self._block_bytes:
            raise TransportError(f"the peer's blocks have {offer.block_bytes} bytes, ours {self._block_bytes}")
        handle, src_ids, slot, token = offer.payload
        peer = self._peer(handle)
        source = peer.bytes.reshape(-1, self._block_bytes)
        check_ids(src_ids, len(source))
        for src, dst, count in runs(src_ids, dst_ids, max(1, SLICE_BYTES // self._block_bytes)):
            if not peer.lease_valid(slot, token):
                raise OfferRevoked("the source took its offer back")
            pace.before()
            np.copyto(target[dst : dst + count], source[src : src + count])
            pace.after()
        # Read after the last copy: the owner ends the lease before anything else may be written into the blocks.
        if not peer.lease_valid(slot, token):
            raise OfferRevoked("the source took its offer back")
        return offer.nbytes

    def _peer(self, handle: PoolHandle) -> PeerPool:
        with self._lock:
            peer = self._peers.get(handle)
        if peer is None:
            peer = PeerPool(handle)
            peer.populate()
            with self._lock:
                # A peer that came back as a new process has a new pool; the old one's memory must not be kept alive.
                for old in [h for h in self._peers if process_start_ticks(h.pid) != h.start_ticks]:
                    del self._peers[old]
                peer = self._peers.setdefault(handle, peer)
        return peer


def _padded(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _advise(mapping: mmap.mmap, advice: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # Only ever a matter of speed.
        mapping.madvise(advice)


def _populate(mapping: mmap.mmap, advice: int) -> None:
    """In parts, because Python keeps the GIL during each call and other threads have work to do."""
    for start in range(0, len(mapping), POPULATE_BYTES):
        mapping.madvise(advice, start, min(POPULATE_BYTES, len(mapping) - start))
        time.sleep(0)


def _release(fd: int, path: str | None) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)
    _unlink(path)


def _unlink(path: str | None) -> None:
    if path is not None:
        with contextlib.suppress(OSError):
            Path(path).unlink()
