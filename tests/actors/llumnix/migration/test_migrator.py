"""Live migration between real engine loops over real sockets and shared memory: tokens equal the unmigrated definition, and
whatever happens in between nothing leaks and nobody owns a request twice."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace

import pytest

from actors.llumnix.migration import messages as m
from actors.llumnix.migration.channel import PeerConnection
from actors.llumnix.migration.config import MigrationConfig
from tests.actors.llumnix.engine.fakes import check, make_request
from tests.actors.llumnix.migration.instances import Authority, Ingress, Instance, assert_all_clean, wait_for

CONFIG = MigrationConfig(measure="off", commit_timeout_s=0.3, prepare_timeout_s=0.5, copy_timeout_s=2.0)
LONG = {"max_tokens": 120, "ignore_eos": True}


@pytest.fixture
def cluster():
    authority, made = Authority(), []

    def start(
        count: int = 2, config: MigrationConfig = CONFIG, **settings
    ) -> tuple[Authority, list[Instance], Ingress]:
        made.extend(Instance(authority, f"i{n}", config, **settings) for n in range(count))
        return authority, made, Ingress(made)

    yield start
    for instance in made:
        if not instance.dead:
            instance.close()


def test_a_request_moves_while_it_decodes(cluster) -> None:
    authority, (a, b), ingress = cluster(step_s=0.002)
    request = make_request("r", range(1, 50), logprobs=0, **LONG)
    a.add(request)
    wait_for(lambda: a.tokens("r") > 55, "some tokens")
    report = a.migrator.migrate_out("r", b.address, authority.epoch())
    assert report.committed and report.outcome == "committed" and report.reason is None
    assert (report.source, report.destination, report.transport) == ("i0", "i1", "shared_memory")
    assert report.stages >= 2 and report.blocks >= 4 and report.cached_blocks == 0
    assert 0 < report.last_stage_blocks <= CONFIG.last_stage_max_blocks
    assert report.bytes == report.blocks * 128
    assert report.started_at < report.detached_at < report.commit_sent_at < report.received_at
    assert report.received_at <= report.copied_at <= report.attached_at <= report.committed_at
    assert report.downtime_ms == pytest.approx((report.attached_at - report.detached_at) * 1e3)
    assert a.tokens("r") == -1 and b.tokens("r") > 55
    ingress.wait("r")
    check(request, ingress.client)
    assert_all_clean(a, b)


def test_it_moves_to_and_fro_and_the_destination_uses_its_prefix_cache(cluster) -> None:
    authority, (a, b), ingress = cluster(step_s=0.002)
    request = make_request("r", range(1, 60), temperature=1.0, seed=5, repetition_penalty=1.2, **LONG)
    a.add(request)
    here, there, cached = a, b, []
    for _ in range(5):
        before = here.tokens("r")
        wait_for(lambda h=here, n=before: h.tokens("r") >= n + 6, "progress")
        report = here.migrator.migrate_out("r", there.address, authority.epoch())
        assert report.committed, report
        cached.append(report.cached_blocks)
        here, there = there, here
    assert cached[0] == cached[1 - 1] == 0 and min(cached[1:]) >= 3
    ingress.wait("r")
    check(request, ingress.client)
    assert_all_clean(a, b)


def test_recompute_mode_copies_nothing_and_changes_no_token(cluster) -> None:
    authority, (a, b), ingress = cluster(step_s=0.002)
    request = make_request("r", range(1, 60), temperature=0.8, seed=3, **LONG)
    a.add(request)
    wait_for(lambda: a.tokens("r") > 65, "some tokens")
    report = a.migrator.migrate_out("r", b.address, authority.epoch(), mode="recompute")
    assert report.committed and report.blocks == report.bytes == 0 and report.mode == "recompute"
    ingress.wait("r")
    check(request, ingress.client)
    assert_all_clean(a, b)


def test_a_waiting_request_moves_without_blocks(cluster) -> None:
    authority, (a, b), ingress = cluster(step_s=0.002, max_num_seqs=1)
    first, second = make_request("first", range(1, 20), **LONG), make_request("second", range(3, 30), max_tokens=20)
    a.add(first, second)
    report = a.migrator.migrate_out("second", b.address, authority.epoch())
    assert report.committed and report.blocks == 0
    ingress.wait("first", "second")
    check(first, ingress.client)
    check(second, ingress.client)
    assert_all_clean(a, b)


def test_the_source_chooses_when_it_is_not_told(cluster) -> None:
    authority, (a, b), ingress = cluster(step_s=0.002)
    nothing = a.migrator.migrate_out(None, b.address, authority.epoch())
    assert not nothing.committed and nothing.reason == "busy" and "no request" in nothing.detail
    requests = [make_request(f"r{n}", range(1, 20 + 20 * n), priority=n == 0, **LONG) for n in range(3)]
    a.add(*requests)
    wait_for(lambda: min(a.tokens(r.request_id) - len(r.prompt_token_ids) for r in requests) > 3, "decoding")
    report = a.migrator.migrate_out(None, b.address, authority.epoch())
    assert report.committed and report.request_id == "r1"  # Low priority, then short.
    ingress.wait("r0", "r1", "r2")
    for request in requests:
        check(request, ingress.client)


def test_many_migrations_at_once(cluster) -> None:
    authority, instances, ingress = cluster(
        3, replace(CONFIG, max_outgoing=8, max_incoming=8), step_s=0.001, blocks=160
    )
    rng = random.Random(1)
    requests = [
        make_request(
            f"r{n}",
            [rng.randrange(1, 61) for _ in range(rng.randrange(1, 60))],
            temperature=rng.choice([0.0, 1.0]),
            seed=n,
            stop=("日本", "abx"),
            ignore_eos=True,
            max_tokens=rng.randrange(40, 120),
            logprobs=0,
        )
        for n in range(12)
    ]
    for n, request in enumerate(requests):
        instances[n % 3].add(request)
    names = [r.request_id for r in requests]
    committed = 0
    deadline = time.monotonic() + 30
    while not all(ingress.client.finished(name) for name in names):
        assert time.monotonic() < deadline
        ingress.poll()
        source, destination = rng.sample(instances, 2)
        futures = [
            source.migrator.start_migration(name, destination.address, authority.epoch())
            for name in rng.sample(names, 3)
            if source.tokens(name) >= 0
        ]
        committed += sum(future.result(10).committed for future in futures)
    assert committed > 5
    for request in requests:
        check(request, ingress.client)
    assert not authority.calls
    assert_all_clean(*instances)


# ---- endings ----------------------------------------------------------------------------------------------------------


def test_no_room_at_the_destination(cluster) -> None:
    authority, (a, b), ingress = cluster(step_s=0.002, blocks=12)
    big = make_request("big", [1, 2, 3, 4] * 20, max_tokens=60, ignore_eos=True)
    other = make_request("other", [5, 6, 7] * 28, max_tokens=60, ignore_eos=True)
    a.add(big)
    b.add(other)
    wait_for(lambda: a.tokens("big") > 82 and b.tokens("other") > 82, "decoding")
    report = a.migrator.migrate_out("big", b.address, authority.epoch())
    assert (report.outcome, report.reason) == ("aborted", "no_memory")
    ingress.wait("big", "other")
    check(big, ingress.client)
    check(other, ingress.client)
    assert not authority.calls
    assert_all_clean(a, b)


def test_other_numerics_are_refused(cluster) -> None:
    authority, (a,), ingress = cluster(1, step_s=0.002)
    other = Instance(authority, "other", CONFIG, numerics="bf16 on another CPU")
    request = make_request("r", range(1, 50), **LONG)
    a.add(request)
    wait_for(lambda: a.tokens("r") > 52, "decoding")
    report = a.migrator.migrate_out("r", other.address, authority.epoch())
    assert (report.outcome, report.reason) == ("aborted", "numerics")
    assert "bf16 on another CPU" in report.detail
    ingress.wait("r")
    check(request, ingress.client)
    assert_all_clean(a, other)
    other.close()


def test_requests_that_are_not_there(cluster) -> None:
    authority, (a, b), _ = cluster()
    report = a.migrator.migrate_out("nobody", b.address, authority.epoch())
    assert (report.outcome, report.reason) == ("aborted", "finished")
    assert_all_clean(a, b)


@pytest.mark.parametrize("when", ["copying", "late"])
def test_a_client_that_leaves_frees_the_request_on_both_sides(cluster, when: str) -> None:
    # One block takes about as long to copy as the duty's pauses allow: the copy is under way when the client leaves.
    authority, (a, b), _ = cluster(step_s=0.002)
    a.add(make_request("r", [*range(1, 51)] * 4, max_tokens=400, ignore_eos=True))
    wait_for(lambda: a.tokens("r") > 205, "decoding")
    gate = threading.Event()
    slow_down(b, gate)
    future = a.migrator.start_migration("r", b.address, authority.epoch())
    if when == "late":
        gate.set()
        time.sleep(0.01)
    else:
        wait_for(lambda: b.engine.blocks.reserving == ("r",), "the reservation")
    a.migrator.cancel("r")
    b.abort("r")
    gate.set()
    assert not future.result(10).committed or when == "late"
    wait_for(lambda: a.tokens("r") == -1 and b.tokens("r") == -1, "the request to be gone")
    assert_all_clean(a, b)


def slow_down(instance: Instance, gate: threading.Event) -> None:
    """Copies into this instance wait for the gate."""
    fetch = instance.transport.fetch

    def gated(offer, ids, *rest):
        gate.wait(5)
        return fetch(offer, ids, *rest)

    instance.transport.fetch = gated


def test_a_request_that_ends_while_it_is_copied(cluster) -> None:
    authority, (a, b), ingress = cluster(step_s=0.001)
    gate = threading.Event()
    slow_down(b, gate)
    request = make_request("r", range(1, 50), max_tokens=20, ignore_eos=True)
    a.add(request)
    wait_for(lambda: a.tokens("r") > 50, "decoding")
    future = a.migrator.start_migration("r", b.address, authority.epoch())
    ingress.wait("r")
    held = a.loop.submit(a.engine.audit).result()
    assert held.holds == 1 and held.referenced >= 3  # The peer may still read them.
    gate.set()
    report = future.result(10)
    assert (report.outcome, report.reason) == ("aborted", "finished")
    check(request, ingress.client)
    assert_all_clean(a, b)


def test_a_commit_without_an_answer_is_reclaimed(cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """COMMITTED is lost: the destination owns the request for a while, then is told to drop it; no token is wrong."""
    authority, (a, b), ingress = cluster(step_s=0.002)
    authority.failures = 2
    send = PeerConnection.send

    def lossy(self, message):
        if not isinstance(message, m.Committed):
            send(self, message)

    monkeypatch.setattr(PeerConnection, "send", lossy)
    request = make_request("r", range(1, 50), temperature=1.0, seed=2, max_tokens=300, ignore_eos=True)
    a.add(request)
    wait_for(lambda: a.tokens("r") > 55, "decoding")
    epoch = authority.epoch()
    future = a.migrator.start_migration("r", b.address, epoch)
    wait_for(lambda: b.tokens("r") >= 0, "the destination to take it")
    ingress.poll()
    report = future.result(10)
    assert (report.outcome, report.reason) == ("aborted", "timeout") and report.downtime_ms == 0
    assert authority.calls == [("r", epoch)] * 3
    wait_for(lambda: b.tokens("r") == -1, "the destination to drop it")
    assert a.tokens("r") >= 0
    ingress.wait("r")
    check(request, ingress.client)
    assert ingress.epochs["r"] > epoch
    assert_all_clean(a, b)


def test_a_reclaim_that_says_no_drops_the_request(cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, (a, b), _ = cluster(step_s=0.002)
    authority.gone.add("r")
    send = PeerConnection.send
    monkeypatch.setattr(
        PeerConnection, "send", lambda self, message: None if isinstance(message, m.Commit) else send(self, message)
    )
    a.add(make_request("r", range(1, 50), max_tokens=300, ignore_eos=True))
    wait_for(lambda: a.tokens("r") > 52, "decoding")
    report = a.migrator.migrate_out("r", b.address, authority.epoch())
    assert (report.outcome, report.reason) == ("dropped", "timeout")
    assert a.tokens("r") == b.tokens("r") == -1
    assert_all_clean(a, b)


def test_a_connection_that_breaks_in_mid_copy(cluster) -> None:
    authority, (a, b), ingress = cluster(step_s=0.002)
    gate = threading.Event()
    slow_down(b, gate)
    request = make_request("r", range(1, 50), max_tokens=200, ignore_eos=True)
    a.add(request)
    wait_for(lambda: a.tokens("r") > 52, "decoding")
    future = a.migrator.start_migration("r", b.address, authority.epoch())
    wait_for(lambda: b.engine.blocks.reserving == ("r",), "the reservation")
    next(iter(b.migrator._connections)).close()
    report = future.result(10)
    assert (report.outcome, report.reason) == ("aborted", "peer_lost")
    gate.set()
    wait_for(lambda: not b.engine.blocks.reserving, "the reservation to be given back")
    assert a.migrator.migrate_out("r", b.address, authority.epoch()).committed  # On a new connection.
    ingress.wait("r")
    check(request, ingress.client)
    assert_all_clean(a, b)


def test_limits_and_doubled_orders(cluster) -> None:
    authority, (a, b), ingress = cluster(config=replace(CONFIG, max_outgoing=1), step_s=0.002)
    gate = threading.Event()
    slow_down(b, gate)
    requests = [make_request(f"r{n}", range(1, 50), seed=n, **LONG) for n in range(2)]
    a.add(*requests)
    wait_for(lambda: a.tokens("r1") > 52, "decoding")
    first = a.migrator.start_migration("r0", b.address, authority.epoch())
    same = a.migrator.start_migration("r0", b.address, authority.epoch()).result(1)
    assert same.reason == "busy" and "already migrating" in same.detail
    more = a.migrator.start_migration("r1", b.address, authority.epoch()).result(1)
    assert more.reason == "busy" and "on their way out" in more.detail
    gate.set()
    assert first.result(10).committed
    ingress.wait("r0", "r1")
    assert_all_clean(a, b)


def test_a_wrong_key_and_a_peer_that_is_gone(cluster) -> None:
    authority, (a, b), ingress = cluster(step_s=0.002)
    request = make_request("r", range(1, 50), **LONG)
    a.add(request)
    wait_for(lambda: a.tokens("r") > 52, "decoding")
    b.migrator._authkey = b"another key"
    report = a.migrator.migrate_out("r", b.address, authority.epoch())
    assert report.reason == "peer_lost" and "authenticate" in report.detail
    b.close()
    b.dead = True
    report = a.migrator.migrate_out("r", b.address, authority.epoch())
    assert report.reason == "peer_lost" and "i1" in report.detail
    ingress.instances.remove(b)
    ingress.wait("r")
    check(request, ingress.client)
    assert_all_clean(a)


def test_over_tcp_and_measured(cluster) -> None:
    authority, (a, b), ingress = cluster(config=replace(CONFIG, measure="all"), step_s=0.002, host="127.0.0.1")
    far = replace(b.address, unix_address=None)
    request = make_request("r", range(1, 50), **LONG)
    a.add(request)
    wait_for(lambda: a.tokens("r") > 52, "decoding")
    assert a.migrator.migrate_out("r", far, authority.epoch()).committed
    (row,) = a.migrator.measurements()
    assert (row.peer, row.transport, row.error) == ("i1", "shared_memory", None)
    assert row.latency_ms > 0 and row.gib_per_s > 0
    ingress.wait("r")
    check(request, ingress.client)
    assert_all_clean(a, b)


def test_closing_in_mid_migration_keeps_the_request(cluster) -> None:
    authority, (a, b), ingress = cluster(step_s=0.002)
    gate = threading.Event()
    slow_down(b, gate)
    request = make_request("r", range(1, 50), **LONG)
    a.add(request)
    wait_for(lambda: a.tokens("r") > 52, "decoding")
    future = a.migrator.start_migration("r", b.address, authority.epoch())
    a.migrator.close()
    assert future.result(1).reason == "shutdown"
    gate.set()
    ingress.wait("r")
    check(request, ingress.client)
    wait_for(lambda: not b.engine.blocks.reserving, "the reservation to be given back")
    assert_all_clean(a, b)
