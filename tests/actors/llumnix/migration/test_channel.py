"""The migrators' own connections: who may talk, what arrives, and what a broken or hostile peer can do."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from actors.llumnix.migration.channel import ChannelError, PeerAddress, PeerConnection, PeerListener, connect
from actors.llumnix.migration.messages import KVLayout
from actors.llumnix.migration.timers import Timers
from actors.llumnix.migration.transport.shared_memory import boot_id

KEY = b"secret"


class Server:
    """Echoes what it is sent."""

    def __init__(self, host: str | None = None):
        self.connections: list[PeerConnection] = []
        self.received: list[object] = []
        self.lost = threading.Event()
        self.listener = PeerListener(self._accepted, host).start()
        self.address = PeerAddress(
            "server",
            "node",
            host or "localhost",
            boot_id(),
            self.listener.unix_address,
            self.listener.tcp_address,
            KVLayout("n", 16, 64),
            (),
        )

    def _accepted(self, sock: socket.socket) -> None:
        connection = PeerConnection(sock, self._message, lambda c: self.lost.set(), "server")
        connection.authenticate(KEY, listening=True)
        self.connections.append(connection)
        connection.start()

    def _message(self, connection: PeerConnection, message: object) -> None:
        self.received.append(message)
        if message == "raise":
            raise RuntimeError("a bug of the server")
        connection.send(message)


@pytest.fixture(params=["unix", "tcp"])
def server(request):
    made = Server("127.0.0.1" if request.param == "tcp" else None)
    if request.param == "tcp":
        made.address = PeerAddress(**{**vars(made.address), "unix_address": None})
    yield made
    made.listener.close()


def client_of(server: Server, key: bytes = KEY):
    received: list[object] = []
    lost = threading.Event()
    connection = PeerConnection(
        connect(server.address), lambda c, m: received.append(m), lambda c: lost.set(), "client"
    )
    connection.authenticate(key, listening=False)
    return connection.start(), received, lost


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_messages_from_many_threads_arrive_whole(server: Server) -> None:
    connection, received, lost = client_of(server)
    threads = [
        threading.Thread(target=lambda n=n: [connection.send((n, i, b"x" * 10_000)) for i in range(20)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(received) == 80)
    assert sorted(m[:2] for m in received) == [(n, i) for n in range(4) for i in range(20)]
    for n in range(4):
        assert [m[1] for m in received if m[0] == n] == list(range(20))
    connection.close()
    assert lost.wait(10) and server.lost.wait(10)
    with pytest.raises(ChannelError):
        connection.send("too late")


def test_a_wrong_key_is_refused_before_anything_is_unpickled(server: Server) -> None:
    with pytest.raises(ChannelError, match="authenticate"):
        client_of(server, b"guess")
    assert not server.received and not server.connections
    client_of(server)[0].close()


def test_a_silent_client_holds_up_nobody(server: Server) -> None:
    silent = connect(server.address)
    connection, received, _ = client_of(server)
    connection.send("hello")
    wait_for(lambda: received == ["hello"])
    silent.close()


def test_a_message_that_breaks_the_server_ends_only_that_connection(server: Server) -> None:
    connection, _, lost = client_of(server)
    other, received, other_lost = client_of(server)
    connection.send("raise")
    assert lost.wait(10)
    other.send("still here")
    wait_for(lambda: received == ["still here"])
    assert not other_lost.is_set()


def test_unreachable_peers_say_why(server: Server) -> None:
    server.listener.close()
    with pytest.raises(ChannelError, match="server cannot be reached"):
        connect(server.address, timeout_s=1)
    far = PeerAddress("far", "n", "h", "another boot", "\0somewhere", None, KVLayout("n", 16, 64), ())
    with pytest.raises(ChannelError, match="another host and listens on no TCP port"):
        connect(far)


def test_timers_fire_in_order_and_survive_a_call_that_fails() -> None:
    timers, fired = Timers(), []

    def fail() -> None:
        fired.append("fail")
        raise RuntimeError("a bug of the caller")

    timers.after(0.06, lambda: fired.append("late"))
    timers.after(0.02, fail)
    cancelled = timers.after(0.03, lambda: fired.append("never"))
    cancelled.cancel()
    timers.after(0.04, lambda: fired.append("early"))
    wait_for(lambda: len(fired) == 3)
    assert fired == ["fail", "early", "late"]
    timers.close()
