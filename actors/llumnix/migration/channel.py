"""Direct, authenticated connections between the migrators of two instances: no RPC layer in the last stage of a migration.

On one host an abstract Unix socket, between hosts TCP without delay; ``multiprocessing.connection`` frames, pickles and
authenticates (mutual HMAC challenge with a shared key; only who knows it can send us pickles). One supervised thread a
connection reads; sending is thread-safe and never blocks longer than ``SEND_TIMEOUT_S``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge  # type: ignore[attr-defined]
from typing import Any

from actors.llumnix.migration.messages import KVLayout
from actors.llumnix.migration.transport.shared_memory import boot_id

log = logging.getLogger(__name__)

SEND_TIMEOUT_S = 2.0
HANDSHAKE_TIMEOUT_S = 5.0
BUFFER_BYTES = 4 << 20
"""Socket buffers: a message of the last stage fits in whole, so that the engine's thread does not wait for the reader."""


class ChannelError(ConnectionError):
    """The peer cannot be reached, is not who it should be, or is gone."""


@dataclass(frozen=True)
class PeerAddress:
    """Where an instance's migrator listens and what its KV cache is like. Picklable, hashable."""

    instance_id: str
    node_id: str
    host: str
    """IP address or name at which other nodes reach this one."""
    boot_id: str
    unix_address: str | None
    """Abstract Unix socket (first byte 0)."""
    tcp_address: tuple[str, int] | None
    layout: KVLayout
    endpoints: tuple[tuple[str, Any], ...]
    """(name of a KV transport, what it needs to know of us), the preferred first."""

    @property
    def pool(self) -> Any:
        """Handle of the shared-memory pool, None if it has none."""
        return dict(self.endpoints).get("shared_memory")


class PeerConnection:
    """One connection. ``on_message(connection, message)`` and, once, ``on_lost(connection)`` are called on its reader thread."""

    def __init__(
        self,
        sock: socket.socket,
        on_message: Callable[[PeerConnection, Any], None],
        on_lost: Callable[[PeerConnection], None],
        name: str,
    ):
        self.peer_id = ""
        """Instance id of the peer, once it is known."""
        self._socket = sock
        self._connection = Connection(os.dup(sock.fileno()))
        self._on_message = on_message
        self._on_lost = on_lost
        self._send_lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name=name, daemon=True)

    def start(self) -> PeerConnection:
        """Start reading; returns self."""
        self._thread.start()
        return self

    def authenticate(self, authkey: bytes, listening: bool) -> None:
        """Prove to one another that both know ``authkey``. Raises ChannelError."""
        try:
            _timeouts(self._socket, receive_s=HANDSHAKE_TIMEOUT_S)
            steps = (deliver_challenge, answer_challenge) if listening else (answer_challenge, deliver_challenge)
            for step in steps:
                step(self._connection, authkey)
            _timeouts(self._socket, receive_s=0)
        except (AuthenticationError, OSError, EOFError, AssertionError, ValueError) as error:
            self.close()
            raise ChannelError(f"the peer did not authenticate: {error or type(error).__name__}") from error

    def send(self, message: Any) -> None:
        """Send one picklable message. Raises ChannelError; the connection is then closed."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        try:
            with self._send_lock:
                self._connection.send_bytes(data)
        except (OSError, ValueError) as error:
            self.close()
            raise ChannelError(f"the peer cannot be sent to: {error}") from error

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """End the connection; the reader thread then reports it lost. Idempotent."""
        if not self._closed.is_set():
            self._closed.set()
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def join(self, timeout_s: float) -> None:
        """Wait for the reader thread's end."""
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _read(self) -> None:
        try:
            while not self._closed.is_set():
                message = pickle.loads(self._connection.recv_bytes())
                self._on_message(self, message)
        except (EOFError, OSError) as error:
            if not self._closed.is_set():
                log.debug("connection to %s ended: %r", self.peer_id or "a peer", error)
        except Exception:
            # Whatever a message did to us must not stop others; the peer sees the connection end and falls back.
            log.exception("connection to %s failed", self.peer_id or "a peer")
        finally:
            self.close()
            self._connection.close()
            self._socket.close()
            self._on_lost(self)


class PeerListener:
    """Accepts connections on an abstract Unix socket and, if ``tcp_host`` is given, on a TCP port of that address.

    ``accepted(socket)`` is called on a thread of its own for every connection, so that a slow or hostile client holds up
    nobody.
    """

    def __init__(self, accepted: Callable[[socket.socket], None], tcp_host: str | None = None, backlog: int = 128):
        self.unix_address: str | None = None
        self.tcp_address: tuple[str, int] | None = None
        self._accepted = accepted
        self._sockets: list[socket.socket] = []
        self._closing = False
        try:
            address = f"\0sextant-migration-{os.getpid()}-{secrets.token_hex(8)}"
            unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            unix.bind(address)
        except (OSError, AttributeError) as error:
            log.info("no abstract Unix sockets on this system (%s)", error)
        else:
            unix.listen(backlog)
            self._sockets.append(unix)
            self.unix_address = address
        if tcp_host is not None:
            try:
                tcp = socket.create_server((tcp_host, 0), backlog=backlog)
            except OSError as error:
                self.close()
                raise ChannelError(f"cannot listen on {tcp_host}: {error}") from error
            self._sockets.append(tcp)
            self.tcp_address = (tcp_host, tcp.getsockname()[1])
        if not self._sockets:
            raise ChannelError("neither a Unix socket nor a TCP address to listen on")
        self._threads = [
            threading.Thread(target=self._accept, args=(sock,), name="migration-accept", daemon=True)
            for sock in self._sockets
        ]

    def start(self) -> PeerListener:
        """Start accepting; returns self."""
        for thread in self._threads:
            thread.start()
        return self

    def close(self) -> None:
        """Stop accepting. Idempotent."""
        self._closing = True
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self, listening: socket.socket) -> None:
        while not self._closing:
            try:
                sock, _ = listening.accept()
            except OSError as error:
                if self._closing:
                    return
                log.warning("accepting a migration peer failed: %s", error)
                continue
            threading.Thread(target=self._serve, args=(sock,), name="migration-handshake", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            prepare(sock)
            self._accepted(sock)
        except ChannelError as error:
            log.warning("refused a connection: %s", error)
        except Exception:
            log.exception("a connection could not be set up")


def connect(peer: PeerAddress, timeout_s: float = 3.0) -> socket.socket:
    """A connected, not yet authenticated socket to the peer. Raises ChannelError."""
    failures = []
    if peer.unix_address is not None and peer.boot_id == boot_id():
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(peer.unix_address)
            return prepare(sock)
        except OSError as error:
            sock.close()
            failures.append(f"Unix socket: {error}")
    if peer.tcp_address is not None:
        try:
            return prepare(socket.create_connection(peer.tcp_address, timeout_s))
        except OSError as error:
            failures.append(f"{peer.tcp_address[0]}:{peer.tcp_address[1]}: {error}")
    why = "; ".join(failures) or "it is on another host and listens on no TCP port"
    raise ChannelError(f"instance {peer.instance_id} cannot be reached ({why})")


def prepare(sock: socket.socket) -> socket.socket:
    """Blocking, with large buffers, no delay and a limit on how long a send may take."""
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    _timeouts(sock, receive_s=0)
    return sock


def _timeouts(sock: socket.socket, receive_s: float) -> None:
    for option, seconds in ((socket.SO_SNDTIMEO, SEND_TIMEOUT_S), (socket.SO_RCVTIMEO, receive_s)):
        whole = int(seconds)
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", whole, int((seconds - whole) * 1e6)))
