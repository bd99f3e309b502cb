"""The ring's connections: one TCP socket to the successor, one from the predecessor, made on first use. No torch, no Ray.

Two hooks belong to who plans paths or injects faults: ``RingOptions.source_port`` chooses the local port of a connection before
it is made, and a limit in bytes per second (``SO_MAX_PACING_RATE``) can be set on a living one, here or through ``LinkControls``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from actors.c4.recorder.errors import CollectiveError, CollectiveTimeoutError, PeerLostError
from actors.c4.recorder.links import FREE, STALLED, WORDS_OFFSET, LinkControls
from actors.c4.recorder.wire import ABORT, ABORT_BYTES, FRAME

SO_MAX_PACING_RATE = 47
"""Linux, unprivileged; bytes per second in an unsigned 32-bit number here, all ones for no limit."""
_NO_LIMIT = 0xFFFFFFFF
_POLL_S = 0.002
_GIVE_UP_S = 0.2
ADDRESS_VARIABLE = "SEXTANT_C4_ADDRESS"

SourcePort = Callable[[int, int], int | None]
"""(source rank, destination rank), both global -> the local port of the connection, None for any."""


class Store(Protocol):
    """The part of a torch store that is used."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class RingOptions:
    """How the ring moves data."""

    algorithm: Literal["ordered", "rotated"] = "ordered"
    """ "ordered": every element is added in rank order, so the bits do not depend on the layout of buckets."""
    piece_bytes: int = 1 << 19
    native: bool = True
    """Run in compiled code without the GIL where a compiler is there; Python otherwise."""
    source_port: SourcePort | None = None
    address: str | None = None
    """Of this host towards the others; None: ``SEXTANT_C4_ADDRESS``, else the one by which the store's host is reached."""


class RingTransport:
    """Both connections of this rank in one group's ring."""

    def __init__(
        self, store: Store, rank: int, ranks: tuple[int, ...], options: RingOptions, controls: LinkControls, name: str
    ):
        """Nothing is connected yet.

        Args:
            store: of the group, with keys of its own.
            rank: place in the ring.
            ranks: global ranks in ring order; at least two.
            controls: this process's link controls.
            name: of the group, for messages.
        """
        self.rank, self.ranks, self.name, self.options = rank, ranks, name, options
        self.size = len(ranks)
        self.predecessor = ranks[(rank - 1) % self.size]
        self.successor = ranks[(rank + 1) % self.size]
        self.controls = controls
        self._store = store
        self._outgoing: socket.socket | None = None
        self._incoming: socket.socket | None = None
        self._rate = FREE
        self._pacing = FREE
        self.error: str | None = None
        """Why the ring is broken; it stays broken then."""

    @property
    def pacing(self) -> int:
        """Limit that ``set_pacing`` set, in bytes per second; 0 for none."""
        return self._pacing

    @property
    def connected(self) -> bool:
        return self._incoming is not None

    @property
    def outgoing(self) -> socket.socket:
        if self._outgoing is None:
            raise CollectiveError(f"The ring of group {self.name} is not connected.")
        return self._outgoing

    @property
    def incoming(self) -> socket.socket:
        if self._incoming is None:
            raise CollectiveError(f"The ring of group {self.name} is not connected.")
        return self._incoming

    def connect(self, timeout_s: float) -> None:
        """Meet both neighbours.

        Raises:
            CollectiveTimeoutError: one of them did not come in time.
            PeerLostError: the store is gone.
            CollectiveError: the wanted source port or address cannot be had.
        """
        deadline = time.monotonic() + timeout_s
        here = _host_id()
        self._store_set(f"c4/host/{self.rank}", here)
        before = self._store_get(f"c4/host/{(self.rank - 1) % self.size}", deadline, self.predecessor)
        address = "127.0.0.1" if before == here else self._own_address()
        token = secrets.token_hex(16)
        with contextlib.ExitStack() as stack:
            try:
                listener = socket.create_server((address, 0), backlog=8)
            except OSError as error:
                raise CollectiveError(
                    f"Rank {self.ranks[self.rank]} cannot listen on {address}: {error.strerror}."
                ) from error
            stack.callback(listener.close)
            port = listener.getsockname()[1]
            self._store_set(f"c4/ring/{self.rank}", f"{address} {port} {token}")
            where = self._store_get(f"c4/ring/{(self.rank + 1) % self.size}", deadline, self.successor)
            outgoing = self._reach(where, deadline)
            stack.callback(outgoing.close)
            incoming = self._accept(listener, token.encode(), deadline)
            stack.pop_all()
            listener.close()
        for connection in (outgoing, incoming):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)
        self._outgoing, self._incoming = outgoing, incoming

    # ---- the outgoing link

    def set_pacing(self, bytes_per_s: int | None) -> None:
        """Limit the outgoing link; None lifts it. A limit in ``LinkControls`` comes first."""
        self._pacing = bytes_per_s or FREE
        self.apply_controls()

    def apply_controls(self) -> bool:
        """Follow the link's word; False while it is stalled."""
        word = self.controls.get(self.successor)
        if word == STALLED:
            return False
        wanted = word or self._pacing
        if wanted != self._rate and self._outgoing is not None:
            rate = struct.pack("@I", min(wanted, _NO_LIMIT - 1) if wanted else _NO_LIMIT)
            with contextlib.suppress(OSError):  # not Linux: the link runs unpaced
                self._outgoing.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, rate)
            self._rate = wanted
        return True

    def control_address(self) -> int:
        """Where compiled code finds the outgoing link's word."""
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.controls.map))
        return base + WORDS_OFFSET + 8 * self.successor

    # ---- the end

    def abort(self, reason: str, rest: bytes = b"") -> None:
        """Tell both neighbours why this rank gives up, and take no further operation.

        Args:
            reason: a sentence; it is passed on from rank to rank.
            rest: of a message that was being sent, so that the successor reads the sentence and not data.
        """
        if self.error is not None:
            return
        self.error = reason
        text = reason.encode()[:ABORT_BYTES]
        frame = FRAME.pack(ABORT, 0, 0, len(text)) + text
        deadline = time.monotonic() + _GIVE_UP_S
        if self._incoming is not None:
            _send_until(self._incoming, memoryview(frame), deadline)
        if self._outgoing is not None:
            _send_until(self._outgoing, memoryview(rest + frame), deadline)
        for connection in (self._incoming, self._outgoing):
            if connection is not None:  # kept open until close(), so that no reset overtakes the sentence
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)

    def interrupt(self, reason: str) -> None:
        """Let an operation that another thread is in fail now."""
        self.error = self.error or reason
        for connection in (self._incoming, self._outgoing):
            if connection is not None:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close both connections."""
        self.error = self.error or f"The ring of group {self.name} is closed."
        for connection in (self._incoming, self._outgoing):
            if connection is not None:
                connection.close()

    # ---- meeting

    def _reach(self, where: str, deadline: float) -> socket.socket:
        address, port, token = where.split()
        me = self.ranks[self.rank]
        wanted = self.options.source_port(me, self.successor) if self.options.source_port else None
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            if wanted is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    connection.bind(("", wanted))
                except OSError as error:
                    raise CollectiveError(
                        f"Rank {me} cannot have the source port {wanted} towards rank {self.successor}: {error.strerror}."
                    ) from error
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection.connect((address, int(port)))
                connection.sendall(token.encode())
            except TimeoutError as error:
                raise self._absent(self.successor) from error
            except OSError as error:
                raise PeerLostError(
                    f"Rank {me} cannot reach rank {self.successor} at {address}:{port}: {error}."
                ) from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _accept(self, listener: socket.socket, token: bytes, deadline: float) -> socket.socket:
        """The predecessor's connection: whoever does not show the token that the store holds is sent away."""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._absent(self.predecessor)
            listener.settimeout(left)
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(min(5.0, max(0.01, left)))
            try:
                shown = b""
                while len(shown) < len(token) and (part := connection.recv(len(token) - len(shown))):
                    shown += part
            except OSError:
                shown = b""
            if secrets.compare_digest(shown, token):
                return connection
            connection.close()

    def _own_address(self) -> str:
        chosen = self.options.address or os.environ.get(ADDRESS_VARIABLE)
        if chosen:
            return chosen
        host = os.environ.get("MASTER_ADDR", "")
        try:
            target = socket.getaddrinfo(host or "192.0.2.1", 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(target[0], socket.SOCK_DGRAM) as probe:
                probe.connect(target[4])
                address: str = probe.getsockname()[0]
            if not address.startswith("127.") and address != "::1":
                return address
            # The store lives on this host; others reach it by its name.
            return socket.gethostbyname(socket.gethostname())
        except OSError as error:
            raise CollectiveError(
                f"This host's address towards the other ranks cannot be found ({error}); set {ADDRESS_VARIABLE}."
            ) from error

    def _absent(self, peer: int) -> CollectiveTimeoutError:
        return CollectiveTimeoutError(
            f"Rank {peer} did not come to the ring of group {self.name} before the timeout: it has not entered the operation."
        )

    def _store_set(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
        except RuntimeError as error:
            raise PeerLostError(f"The store of group {self.name} is gone: {error}") from error

    def _store_get(self, key: str, deadline: float, peer: int) -> str:
        # Not a blocking get: that would hold the client's lock against the process's other threads.
        try:
            while not self._store.check([key]):
                if time.monotonic() > deadline:
                    raise self._absent(peer)
                time.sleep(_POLL_S)
            return self._store.get(key).decode()
        except CollectiveError:
            raise
        except RuntimeError as error:
            raise PeerLostError(f"The store of group {self.name} is gone: {error}") from error


def _host_id() -> str:
    """Alike exactly for processes that share a loopback device."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/net').readlink()}"
    except OSError:
        return socket.gethostname()


def _send_until(connection: socket.socket, data: memoryview, deadline: float) -> None:
    while data and (left := deadline - time.monotonic()) > 0:
        try:
            data = data[connection.send(data, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            select.select([], [connection], [], left)
        except OSError:
            return
