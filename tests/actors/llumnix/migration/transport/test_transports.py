"""KV transports between two real processes: every byte that was offered arrives, nothing else changes, and a copy of what was
taken back, of a dead peer or of a stranger is never taken for good."""

from __future__ import annotations

import gc
import os
import pickle
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.llumnix.migration.transport.base import Offer, OfferRevoked, Pace, TransportError, runs
from actors.llumnix.migration.transport.choice import make_transports
from actors.llumnix.migration.transport.shared_memory import (
    LEASE_SLOTS,
    SharedMemoryTransport,
    SharedPool,
    boot_id,
    process_start_ticks,
)

from .peer import BLOCK_BYTES, BLOCKS, Peer, contents, make

SOURCE = [3, 4, 5, 9, 8, 0, 39, 11, 12, 13, 14]
KINDS = ["shared_memory", "shared_file", "gloo"]
TARGET = [7, 8, 9, 10, 11, 2, 0, 20, 21, 30, 31]


@pytest.fixture(scope="module")
def peers():
    """One other process for each kind, and two that may be killed; all start at the same time, because that takes seconds."""
    started = {name: Peer(name.partition("-")[0]) for name in (*KINDS, "shared_memory-mortal", "gloo-mortal")}
    yield started
    for peer in started.values():
        peer.kill()


@pytest.fixture(params=KINDS)
def pair(request, peers):
    peer = peers[request.param]
    peer.call("refill")
    transport, blocks, pool = make(request.param)
    blocks.copy_(contents(2))
    yield peer, transport, blocks
    transport.close()
    pool.close()


def test_bytes_arrive_where_they_should_and_nowhere_else(pair) -> None:
    peer, transport, blocks = pair
    assert transport.reachable(peer.call("endpoint"))
    assert peer.call("reachable", transport.endpoint())
    want = contents(2)
    for _ in range(2):
        offer = peer.call("offer", SOURCE, transport.endpoint())
        assert (offer.num_blocks, offer.nbytes) == (len(SOURCE), len(SOURCE) * BLOCK_BYTES)
        assert transport.probe(offer) == offer.nbytes if transport.name != "gloo" else True
        assert transport.fetch(offer, TARGET) == offer.nbytes
        want[TARGET] = contents(1)[SOURCE]
        assert torch.equal(blocks, want)
        peer.call("revoke", offer)


def test_a_probe_changes_nothing(pair) -> None:
    peer, transport, blocks = pair
    offer = peer.call("offer", [0] * 8, transport.endpoint())
    assert transport.probe(offer) == offer.nbytes
    assert torch.equal(blocks, contents(2))


def test_what_was_taken_back_is_not_copied(pair) -> None:
    peer, transport, _ = pair
    kept = peer.call("offer", SOURCE, transport.endpoint())
    assert transport.fetch(kept, TARGET)  # Gloo's group exists from here on.
    if transport.name == "gloo":
        return  # An offer taken back before it was wanted is never sent: its reader runs into gloo's time-out.
    offer = peer.call("offer", SOURCE, transport.endpoint())
    peer.call("revoke", offer)
    with pytest.raises(OfferRevoked):
        transport.fetch(offer, TARGET)
    peer.call("revoke", offer)  # Twice is harmless, also after the slot was given to another.
    again = peer.call("offer", SOURCE, transport.endpoint())
    peer.call("revoke", offer)
    assert transport.fetch(again, TARGET)


def test_an_offer_taken_back_in_mid_copy_fails(pair) -> None:
    peer, transport, _ = pair
    transport.fetch(peer.call("offer", [1], transport.endpoint()), [1])
    offer = peer.call("offer", list(range(0, BLOCKS, 2)), transport.endpoint())

    class Slow(Pace):
        """Half-way, the source takes its blocks back and writes something else into them."""

        slices = 0

        def before(self) -> None:
            self.slices += 1
            if self.slices == 3:
                peer.call("revoke", offer)
                peer.call("write", 7)

    with pytest.raises(OfferRevoked):
        transport.fetch(offer, list(range(20)), Slow())


def test_a_cancelled_copy_stops_and_the_next_one_works(pair) -> None:
    peer, transport, blocks = pair
    stop = threading.Event()
    offer = peer.call("offer", list(range(0, BLOCKS, 2)), transport.endpoint())
    calls = []

    def cancelled() -> bool:
        calls.append(1)
        return len(calls) > 2

    with pytest.raises(OfferRevoked, match="cancelled"):
        transport.fetch(offer, list(range(20)), Pace(1.0, cancelled))
    assert not stop.is_set() and len(calls) == 3
    peer.call("revoke", offer)
    offer = peer.call("offer", SOURCE, transport.endpoint())
    assert transport.fetch(offer, TARGET)
    assert torch.equal(blocks[TARGET], contents(1)[SOURCE])


def test_offers_that_do_not_fit(pair) -> None:
    peer, transport, _ = pair
    offer = peer.call("offer", [1, 2], transport.endpoint())
    for ids, complaint in (([BLOCKS], "outside the pool"), ([-1], "outside the pool")):
        with pytest.raises(TransportError, match=complaint):
            transport.offer(ids, transport.endpoint())
        with pytest.raises(TransportError, match=complaint):
            transport.fetch(replace(offer, num_blocks=1), ids)
    with pytest.raises(TransportError, match="bytes"):
        transport.fetch(replace(offer, block_bytes=1), [1, 2])
    with pytest.raises((TransportError, ValueError)):
        transport.fetch(offer, [1])


# ---- shared memory ---------------------------------------------------------------------------------------------------


def test_a_dead_peers_pool_stays_readable_once_mapped_and_cannot_be_opened_anew(peers) -> None:
    peer = peers["shared_memory-mortal"]
    transport, blocks, pool = make("shared_memory")
    offer = peer.call("offer", SOURCE, None)
    handle = peer.call("endpoint")
    transport.prepare(handle)
    peer.kill()
    assert transport.fetch(offer, TARGET)
    assert torch.equal(blocks[TARGET], contents(1)[SOURCE])
    other = SharedMemoryTransport(pool, BLOCK_BYTES)
    assert not other.reachable(handle)
    with pytest.raises(TransportError, match="is gone"):
        other.fetch(offer, TARGET)


def test_strangers_are_refused() -> None:
    pool = SharedPool.create(1 << 16)
    handle = pool.handle
    assert pickle.loads(pickle.dumps(handle)) == handle
    SharedPool.open(handle)
    other = SharedPool.create(1 << 16)
    for wrong, complaint in (
        (replace(handle, boot_id="another"), "another host"),
        (replace(handle, start_ticks=(handle.start_ticks or 0) + 1), "is gone"),
        (replace(handle, pid=os.getppid()), "is gone|cannot be opened|not the KV pool"),
        (replace(handle, inode=handle.inode + 1), "not the KV pool"),
        (replace(handle, fd=other.handle.fd), "not the KV pool"),
        (replace(handle, nbytes=1 << 20), "not the KV pool"),
        (replace(handle, fd=9999), "cannot be opened"),
    ):
        with pytest.raises(TransportError, match=complaint):
            SharedPool.open(wrong)


def test_peers_map_read_only_and_see_zeros_first() -> None:
    pool = SharedPool.create(100_001)
    assert pool.tensor.shape == (100_001,) and not pool.tensor.any()
    view = SharedPool.open(pool.handle)
    pool.tensor[5] = 9
    assert view.bytes[5] == 9
    with pytest.raises(ValueError, match="read-only"):
        view.bytes[5] = 1


@pytest.mark.parametrize("kind", ["memfd", "file"])
def test_nothing_is_left_behind(kind: str) -> None:
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    pool = SharedPool.create(1 << 20, kind)
    path = pool.handle.path
    assert (path is not None and Path(path).exists()) == (kind == "file")
    tensor = pool.tensor
    pool.close()
    pool.close()
    assert path is None or not Path(path).exists()
    tensor.fill_(3)  # The memory lives as long as somebody uses it.
    with pytest.raises(TransportError):
        SharedPool.open(pool.handle)
    other = SharedPool.create(1 << 20, kind)
    path = other.handle.path
    del other, pool, tensor
    gc.collect()
    assert path is None or not Path(path).exists()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_bad_sizes() -> None:
    with pytest.raises(TransportError, match="positive"):
        SharedPool.create(0)
    with pytest.raises(TransportError, match="whole number of blocks"):
        SharedMemoryTransport(SharedPool.create(100), 33)
    with pytest.raises(TransportError, match="MiB of shared memory"):
        SharedPool.create(1 << 55)


def test_leases_run_out_with_a_sentence_and_come_back() -> None:
    transport = SharedMemoryTransport(SharedPool.create(1000), 100)
    offers = [transport.offer([1]) for _ in range(LEASE_SLOTS)]
    with pytest.raises(TransportError, match="offers are open"):
        transport.offer([1])
    transport.revoke(offers[17])
    transport.offer([1])


def test_who_we_are() -> None:
    assert boot_id() == boot_id() != ""
    assert process_start_ticks(os.getpid()) > 0 and process_start_ticks(2**22 + 1) is None


# ---- gloo ------------------------------------------------------------------------------------------------------------


def test_gloo_serves_two_offers_at_the_same_time(peers) -> None:
    peer = peers["gloo"]
    peer.call("refill")
    transport, blocks, _ = make("gloo")
    transport.fetch(peer.call("offer", [1], transport.endpoint()), [1])
    long, short = (peer.call("offer", list(range(n)), transport.endpoint()) for n in (30, 2))
    ended: list[str] = []
    started = threading.Event()

    class Slow(Pace):
        def before(self) -> None:
            started.set()
            time.sleep(0.02)

    def fetch(offer: Offer, name: str, pace: Pace) -> None:
        transport.fetch(offer, list(range(offer.num_blocks)), pace)
        ended.append(name)

    threads = [threading.Thread(target=fetch, args=(long, "long", Slow()))]
    threads[0].start()
    started.wait(5)
    threads.append(threading.Thread(target=fetch, args=(short, "short", Pace())))
    threads[1].start()
    for thread in threads:
        thread.join(20)
    assert sorted(ended) == ["long", "short"]
    assert torch.equal(blocks[:30], contents(1)[:30])


def test_a_gloo_peer_that_dies_is_an_error_not_a_hang(peers) -> None:
    peer = peers["gloo-mortal"]
    transport, _, _ = make("gloo")
    transport.fetch(peer.call("offer", [1], transport.endpoint()), [1])
    offer = peer.call("offer", [1, 2], transport.endpoint())
    peer.kill()
    with pytest.raises(TransportError):
        transport.fetch(offer, [1, 2])
    # Another process works at once.
    assert transport.fetch(peers["gloo"].call("offer", [1], transport.endpoint()), [1])


# ---- pure parts ------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40), st.integers(1, 5))
def test_runs_cover_every_pair_in_order(pairs, limit) -> None:
    source, target = [a for a, _ in pairs], [b for _, b in pairs]
    expanded = [(a + i, b + i) for a, b, n in runs(source, target, limit) for i in range(n)]
    assert expanded == pairs
    assert all(1 <= n <= limit for _, _, n in runs(source, target, limit))


def test_runs_join_neighbours() -> None:
    assert list(runs([1, 2, 3, 7], [4, 5, 6, 7], 8)) == [(1, 4, 3), (7, 7, 1)]


def test_a_pace_keeps_to_its_duty(monkeypatch: pytest.MonkeyPatch) -> None:
    from actors.llumnix.migration.transport import base

    clock, slept = [0.0], []
    monkeypatch.setattr(base.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(base.time, "sleep", slept.append)
    pace = Pace(0.25)
    for _ in range(10):
        pace.before()
        clock[0] += 0.0002
        pace.after()
    assert sum(slept) == pytest.approx(10 * 0.0002 * 3, rel=0.2) and min(slept) >= 0.001
    with pytest.raises(ValueError, match="duty"):
        Pace(0)


def test_the_choice_of_transports() -> None:
    pool = SharedPool.create(8 * 64)
    kv = pool.tensor.view(torch.float32).view(8, 2, 8)
    assert [t.name for t in make_transports(kv, pool, None)] == ["shared_memory"]
    both = make_transports(kv, pool, "127.0.0.1", ("gloo", "shared_memory"))
    assert [t.name for t in both] == ["gloo", "shared_memory"]
    for transport in both:
        transport.close()
    with pytest.raises(TransportError, match="cannot migrate"):
        make_transports(kv, None, None)
    with pytest.raises(TransportError, match="unknown KV transport 'pigeon'"):
        make_transports(kv, pool, None, ("pigeon",))
