"""An instance's migrator: moves requests out to peers, takes them in from peers. One per engine; knows nothing of Ray.

Threads (all sleep but for the copying): one per listening socket, one per connection, one for time-outs, one copier. What
touches the engine runs on the engine's own thread between two steps. No lock is held while blocks are copied.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from actors.llumnix.engine.loop import EngineLoop
from actors.llumnix.migration import messages as m
from actors.llumnix.migration.channel import (
    ChannelError,
    PeerAddress,
    PeerConnection,
    PeerListener,
    connect,
)
from actors.llumnix.migration.config import MigrationConfig, MigrationReport
from actors.llumnix.migration.driver import Context, Driver
from actors.llumnix.migration.incoming import Incoming
from actors.llumnix.migration.measure import Measurement, Probe, ProbeDone, Prober
from actors.llumnix.migration.outgoing import Outgoing
from actors.llumnix.migration.timers import Timers
from actors.llumnix.migration.transport.base import KVTransport
from actors.llumnix.migration.transport.shared_memory import boot_id
from actors.llumnix.outbox import Outbox
from actors.llumnix.policy.victim import movable

log = logging.getLogger(__name__)

REMEMBERED = 1024
"""Ended migrations kept to answer late messages."""


class MigrationRefused(RuntimeError):
    """The migration could not even begin; the request goes on where it is."""


@dataclass(frozen=True)
class Hello:
    """First message on a connection: who opened it."""

    address: PeerAddress


class Migrator:
    """``migrate_out`` moves a request away; requests from peers are taken in by themselves.

    ``reclaim(request_id, failed_epoch)`` is the epoch authority: a newer epoch under which the request may go on here, or
    None when it must be dropped; called on a thread of its own, may block, is repeated when it raises. ``authkey`` is shared
    by all instances of a deployment. ``host``: address at which other nodes reach this one; None listens on this host only.
    """

    def __init__(
        self,
        loop: EngineLoop,
        outbox: Outbox,
        transports: Sequence[KVTransport],
        layout: m.KVLayout,
        reclaim: Callable[[str, int], int | None],
        authkey: bytes,
        *,
        instance_id: str,
        node_id: str = "",
        host: str | None = None,
        config: MigrationConfig | None = None,
    ):
        if not authkey:
            raise ValueError("the migrators of a deployment need a shared, non-empty authkey")
        config = config or MigrationConfig()
        self._authkey = authkey
        self._transports = {t.name: t for t in transports}
        self._context = Context(
            instance_id,
            loop,
            outbox,
            self._transports,
            layout,
            config,
            Timers(),
            ThreadPoolExecutor(1, thread_name_prefix="migration-copy"),
            ThreadPoolExecutor(2, thread_name_prefix="migration-urgent"),
            reclaim,
        )
        self._lock = threading.Lock()
        self._outgoing: OrderedDict[tuple[str, int], Outgoing] = OrderedDict()
        self._incoming: OrderedDict[str, Incoming] = OrderedDict()
        self._to_peers: dict[PeerAddress, PeerConnection] = {}
        self._connections: set[PeerConnection] = set()
        self._connecting: dict[PeerAddress, threading.Lock] = {}
        self._prober = Prober(self._transports, layout.block_bytes)
        self._avoid: set[tuple[PeerAddress, str]] = set()
        self._closed = False
        self._listener = PeerListener(self._accepted, host)
        self.address = PeerAddress(
            instance_id,
            node_id,
            host or "localhost",
            boot_id(),
            self._listener.unix_address,
            self._listener.tcp_address,
            layout,
            tuple((t.name, t.endpoint()) for t in transports),
        )
        self._listener.start()

    # ---- moving requests

    def migrate_out(
        self,
        request_id: str | None,
        destination: PeerAddress,
        epoch: int,
        mode: Literal["live", "recompute"] | None = None,
    ) -> MigrationReport:
        """Move a request to a peer under a fresh ``epoch`` and wait for the end. See ``start_migration``."""
        return self.start_migration(request_id, destination, epoch, mode).result()

    def start_migration(
        self,
        request_id: str | None,
        destination: PeerAddress,
        epoch: int,
        mode: Literal["live", "recompute"] | None = None,
    ) -> Future[MigrationReport]:
        """Begin to move a request (the policy's choice if None); the future gets the report in every ending.

        Blocks only while a connection to a new peer is set up. ``mode`` overrides the configuration's.
        """
        try:
            request_id = request_id or self._choose()
            connection = self._connection_to(destination)
            transport = self._transport_to(destination, connection)
            migration = Outgoing(self._context, connection, request_id, epoch, destination, transport, mode)
            self._register(migration)
        except (MigrationRefused, ChannelError) as error:
            reason = m.AbortReason.PEER_LOST if isinstance(error, ChannelError) else m.AbortReason.BUSY
            future: Future[MigrationReport] = Future()
            future.set_result(
                MigrationReport(
                    request_id or "",
                    epoch,
                    self._context.instance_id,
                    destination.instance_id,
                    "aborted",
                    reason.value,
                    str(error),
                )
            )
            return future
        migration.start()
        if connection.closed:
            migration.lost()
        return migration.result

    def cancel(self, request_id: str) -> bool:
        """The client is gone: drop the request here, and there if it has got that far. True if a migration was under way."""
        self._context.loop.submit(lambda: self._context.loop.engine.abort(request_id))
        return self._stop(request_id, m.AbortReason.CANCELLED)

    def withdraw(self, request_id: str) -> bool:
        """End the request's migration, if one is under way, and keep the request."""
        return self._stop(request_id, m.AbortReason.WITHDRAWN)

    def active(self) -> tuple[str, ...]:
        """Requests on their way out or in."""
        with self._lock:
            out = [d.request_id for d in self._outgoing.values() if not d.ended]
            return (*out, *(d.request_id for d in self._incoming.values() if not d.ended))

    def measurements(self) -> tuple[Measurement, ...]:
        """What was measured of the transports to each peer so far."""
        return self._prober.table()

    def measure(self, peer: PeerAddress) -> tuple[Measurement, ...]:
        """Measure every transport that reaches the peer now. Raises ChannelError."""
        connection = self._connection_to(peer)
        for name, endpoint in peer.endpoints:
            if name in self._transports and self._transports[name].reachable(endpoint):
                self._prober.measure(connection, peer, name)
        return self._prober.table(peer)

    def close(self, timeout_s: float = 5.0) -> None:
        """End every migration (requests stay where they are), then the threads and transports. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            outgoing, incoming = list(self._outgoing.values()), list(self._incoming.values())
        for migration in (*outgoing, *incoming):
            migration.stop(m.AbortReason.SHUTDOWN)
        for migration in outgoing:
            if not migration.result.done():
                try:
                    migration.result.result(timeout_s)
                except Exception as error:
                    log.warning("migration of %s did not end: %r", migration.request_id, error)
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.close()
        for connection in connections:
            connection.join(1.0)
        self._context.timers.close()
        for executor in (self._context.copier, self._context.urgent):
            executor.shutdown(wait=True, cancel_futures=True)
        for transport in self._transports.values():
            transport.close()

    # ---- inside: source

    def _choose(self) -> str:
        engine = self._context.loop.engine
        load = self._context.loop.submit(engine.load).result()
        chosen = next(movable(load, waiting=True), None)
        if chosen is None:
            raise MigrationRefused("no request of this instance can be moved")
        return chosen.request_id

    def _register(self, migration: Outgoing) -> None:
        with self._lock:
            if self._closed:
                raise MigrationRefused("the instance is shutting down")
            alive = [other for other in self._outgoing.values() if not other.result.done()]
            if any(other.request_id == migration.request_id for other in alive):
                raise MigrationRefused(f"request {migration.request_id} is already migrating")
            if len(alive) >= self._context.config.max_outgoing:
                raise MigrationRefused(f"{len(alive)} requests are on their way out already")
            self._outgoing[migration.request_id, migration.epoch] = migration
            _forget_oldest(self._outgoing)
        migration.result.add_done_callback(lambda future: self._learn(migration, future))

    def _learn(self, migration: Outgoing, future: Future[MigrationReport]) -> None:
        """A transport over which the destination could not read is not chosen again for this peer."""
        if future.exception() is None and future.result().reason == m.AbortReason.COPY_FAILED.value:
            self._avoid.add((migration.peer, migration.transport.name))
            log.warning("copying to %s failed: %s", migration.peer.instance_id, future.result().detail)

    def _transport_to(self, peer: PeerAddress, connection: PeerConnection) -> KVTransport:
        theirs = dict(peer.endpoints)
        usable = [name for name in self._context.config.transports if name in self._transports and name in theirs]
        usable = [name for name in usable if self._transports[name].reachable(theirs[name])]
        if not usable:
            raise MigrationRefused(f"no KV transport reaches instance {peer.instance_id}")
        usable = [name for name in usable if (peer, name) not in self._avoid] or usable
        how = self._context.config.measure
        for name in {"off": (), "chosen": usable[:1], "all": usable}[how]:
            if self._prober.known(peer, name) is None:
                self._prober.measure(connection, peer, name)
        if how == "all":
            usable.sort(key=lambda name: self._prober.cost_s(peer, name))
        return self._transports[usable[0]]

    def _connection_to(self, peer: PeerAddress) -> PeerConnection:
        with self._lock:
            if self._closed:
                raise ChannelError("the instance is shutting down")
            connecting = self._connecting.setdefault(peer, threading.Lock())
        with connecting:
            connection = self._to_peers.get(peer)
            if connection is not None and not connection.closed:
                return connection
            sock = connect(peer, self._context.config.connect_timeout_s)
            name = f"migration-to-{peer.instance_id}"
            connection = PeerConnection(sock, self._from_destination, self._lost, name)
            connection.authenticate(self._authkey, listening=False)
            connection.peer_id = peer.instance_id
            connection.send(Hello(self.address))
            with self._lock:
                self._connections.add(connection)
                self._to_peers[peer] = connection
            return connection.start()

    def _from_destination(self, connection: PeerConnection, message: Any) -> None:
        if isinstance(message, ProbeDone):
            self._prober.done(message)
            return
        with self._lock:
            migration = self._outgoing.get((message.request_id, message.epoch))
        if migration is not None and migration.connection.peer_id == connection.peer_id:
            migration.feed(message)

    # ---- inside: destination

    def _accepted(self, sock: socket.socket) -> None:
        connection = PeerConnection(sock, self._from_source, self._lost, "migration-from")
        connection.authenticate(self._authkey, listening=True)
        with self._lock:
            if self._closed:
                connection.close()
                return
            self._connections.add(connection)
        connection.start()

    def _from_source(self, connection: PeerConnection, message: Any) -> None:
        match message:
            case Hello(address):
                connection.peer_id = address.instance_id
                self._prober.prepare(address)
            case Probe():
                self._context.copier.submit(self._prober.answer, connection, message)
            case m.Message():
                migration = self._incoming_for(connection, message)
                if migration is not None:
                    migration.feed(message)
            case _:
                log.warning("instance %s sent what we do not know: %r", connection.peer_id, type(message))

    def _incoming_for(self, connection: PeerConnection, message: m.Message) -> Incoming | None:
        """The machine that the message is for. Older epochs of a request are answered here: they are over."""
        with self._lock:
            known = self._incoming.get(message.request_id)
        if known is not None and known.epoch == message.epoch:
            return known
        older = known is not None and known.epoch > message.epoch
        if isinstance(message, m.Abort):
            # Void up to that epoch: the engine refuses whatever of it would still come.
            engine = self._context.loop.engine
            self._context.loop.submit(lambda: engine.abort(message.request_id, message.epoch))
            return None
        if known is not None and not older and not known.ended:
            known.feed(m.Abort(message.request_id, known.epoch, m.AbortReason.STALE))
        reason = None
        if older or (known is not None and not known.ended) or not isinstance(message, m.PreAlloc):
            reason = m.AbortReason.STALE
        else:
            migration = Incoming(self._context, connection, message.request_id, message.epoch, self._incoming_ended)
            with self._lock:
                alive = sum(not other.ended for other in self._incoming.values())
                if self._closed or alive >= self._context.config.max_incoming:
                    reason = m.AbortReason.BUSY
                else:
                    self._incoming.pop(message.request_id, None)
                    self._incoming[message.request_id] = migration
                    _forget_oldest(self._incoming)
                    return migration
        try:
            connection.send(m.Abort(message.request_id, message.epoch, reason))
        except ChannelError as error:
            log.debug("instance %s: %s", connection.peer_id, error)
        return None

    def _incoming_ended(self, migration: Incoming, finish: m.Finish) -> None:
        log.debug(
            "migration of %s from %s: %s %s",
            migration.request_id,
            migration.connection.peer_id,
            finish.outcome,
            finish.detail,
        )

    # ---- inside: both

    def _stop(self, request_id: str, reason: m.AbortReason) -> bool:
        with self._lock:
            found: list[Driver] = [d for d in self._outgoing.values() if d.request_id == request_id and not d.ended]
            incoming = self._incoming.get(request_id)
            if incoming is not None and not incoming.ended:
                found.append(incoming)
        for migration in found:
            migration.stop(reason)
        return bool(found)

    def _lost(self, connection: PeerConnection) -> None:
        with self._lock:
            self._connections.discard(connection)
            for peer in [peer for peer, other in self._to_peers.items() if other is connection]:
                del self._to_peers[peer]
            drivers: list[Driver] = [*self._outgoing.values(), *self._incoming.values()]
        self._prober.lost(connection)
        for migration in drivers:
            if migration.connection is connection and not migration.ended:
                migration.lost()


def _forget_oldest(migrations: OrderedDict[Any, Any]) -> None:
    """Keep the newest and every one that has not ended."""
    excess = len(migrations) - REMEMBERED
    for key in [key for key, migration in migrations.items() if migration.ended][: max(0, excess)]:
        del migrations[key]
