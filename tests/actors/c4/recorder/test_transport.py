"""Both engines over real sockets, ranks as threads: equal results, stamps, hooks, and what happens when something is wrong."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from actors.c4.recorder.engine import PythonEngine
from actors.c4.recorder.errors import CollectiveError, CollectiveTimeoutError, MismatchError, PeerLostError
from actors.c4.recorder.links import LinkControls
from actors.c4.recorder.native import load_library, native_engine
from actors.c4.recorder.plan import make_plan
from actors.c4.recorder.records import EDGE_RECORD, OpType
from actors.c4.recorder.ring import RingWriter
from actors.c4.recorder.ring_group import make_job
from actors.c4.recorder.tensors import element_type
from actors.c4.recorder.transport import RingOptions, RingTransport
from actors.c4.recorder.wire import Announcement

ENGINES = ["python", pytest.param("native", marks=pytest.mark.skipif(load_library() is None, reason="no C++ compiler"))]


class DictStore:
    """A store of one process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


@dataclass
class Rank:
    """One rank of a ring in this process."""

    transport: RingTransport
    ring: RingWriter
    controls: LinkControls
    engine: Any

    def run(
        self, tensor: torch.Tensor, sequence: int = 1, op: OpType = OpType.ALL_REDUCE, average: bool = False,
        timeout_s: float = 30.0, form: int = 0,
    ) -> None:  # fmt: skip
        width, payload = tensor.element_size(), tensor.numel() * tensor.element_size()
        me, size, ranks = self.transport.rank, self.transport.size, self.transport.ranks
        plan = make_plan(
            op, payload, width, me, size, root=0, piece_bytes=self.transport.options.piece_bytes, rotated=form == 1
        )
        call = Announcement(sequence, payload, -1, op, element_type([tensor]), 2 if average else 1, form)
        op_id = self.ring.enter(0, sequence, op, call.element_type, payload)
        outgoing, incoming = self.ring.open_edges(
            op_id, sequence, 0, self.transport.predecessor, ranks[me], self.transport.successor
        )
        self.engine.run(make_job(call, plan, tensor, average, size), outgoing, incoming, timeout_s)

    def has_begun(self) -> bool:
        """Whether both records of an operation are there."""
        return bool(self._edges()["op_id"][1])

    def _edges(self) -> Any:
        sizes = self.ring.sizes
        return np.frombuffer(self.ring.map, dtype=EDGE_RECORD, offset=sizes.edges, count=sizes.edge_capacity)

    def edges(self) -> tuple[Any, Any]:
        """The newest outgoing and incoming record."""
        records = self._edges()
        newest = records[records["op_id"] == records["op_id"].max()]
        me = self.transport.ranks[self.transport.rank]
        return newest[newest["source"] == me][0], newest[newest["destination"] == me][0]


class Ring:
    """Connected ranks; use in a with-statement."""

    def __init__(self, size: int, kind: str, **options: Any):
        self.size, self.kind, self.options = size, kind, RingOptions(**{"piece_bytes": 1 << 12, **options})

    def __enter__(self) -> list[Rank]:
        store, ranks = DictStore(), tuple(10 + 2 * rank for rank in range(self.size))
        self.ranks = []
        for rank in range(self.size):
            ring = RingWriter(None, run="r", generation=0, rank=rank, world_size=64, op_capacity=64, edge_capacity=64)
            controls = LinkControls.create(None, 64)
            transport = RingTransport(store, rank, ranks, self.options, controls, "g")
            self.ranks.append(Rank(transport, ring, controls, None))
        outcomes = together(self.ranks, lambda rank: rank.transport.connect(30))
        assert outcomes == [None] * self.size
        for rank in self.ranks:
            native = native_engine(rank.transport, rank.ring.address) if self.kind == "native" else None
            rank.engine = native or PythonEngine(rank.transport)
        return self.ranks

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.transport.close()


def together(ranks: list[Rank], call: Callable[[Rank], None], but: int | None = None) -> list[BaseException | None]:
    """Every rank in a thread of its own; what each raised."""
    raised: list[BaseException | None] = [None] * len(ranks)

    def one(index: int) -> None:
        try:
            call(ranks[index])
        except BaseException as error:
            raised[index] = error

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(ranks)) if index != but]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return raised


def inputs(size: int, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    made = [
        torch.randn(count, generator=torch.Generator().manual_seed(rank), dtype=torch.float64) * 20
        for rank in range(size)
    ]
    return [(one if dtype.is_floating_point else one.abs()).to(dtype) for one in made]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int16, torch.uint8]
)
@pytest.mark.skipif(load_library() is None, reason="no C++ compiler")
def test_both_engines_give_the_same_bits(dtype: torch.dtype) -> None:
    results = []
    for kind in ("python", "native"):
        with Ring(3, kind) as ranks:
            for number, (average, form) in enumerate([(False, 0), (False, 1), (dtype.is_floating_point, 0)], start=1):
                tensors = inputs(3, 5003, dtype)
                if dtype.is_floating_point:
                    tensors[1][7], tensors[2][8] = float("inf"), float("nan")
                by_rank = {id(rank): tensor for rank, tensor in zip(ranks, tensors, strict=True)}
                run = lambda rank, at=number, avg=average, how=form, own=by_rank: rank.run(  # noqa: E731
                    own[id(rank)], at, average=avg, form=how
                )
                assert together(ranks, run) == [None] * 3
                assert all(one.view(torch.uint8).equal(tensors[0].view(torch.uint8)) for one in tensors)
                results.append(tensors[0].clone())
    half = len(results) // 2
    for ours, theirs in zip(results[:half], results[half:], strict=True):
        assert ours.isnan().equal(theirs.isnan())  # which of the many NaNs differs within torch itself
        assert ours[~ours.isnan()].view(torch.uint8).equal(theirs[~theirs.isnan()].view(torch.uint8))


@pytest.mark.parametrize("kind", ENGINES)
def test_the_receiver_sees_how_late_its_predecessor_is_and_who_sent_what(kind: str) -> None:
    with Ring(3, kind) as ranks:
        late = ranks[1]

        def run(rank: Rank) -> None:
            if rank is late:  # begins when the others have heard of one another, and then some
                while not ranks[2].has_begun() or not ranks[0].has_begun() or not ranks[0].edges()[1]["bytes"]:
                    time.sleep(0.005)
                time.sleep(0.15)
            rank.run(torch.ones(4096))  # 16 KiB: four pieces

        assert together(ranks, run) == [None] * 3
        assert ranks[2].edges()[1]["lateness_ns"] >= 0.15e9  # rank 1 is its predecessor
        for index, rank in enumerate(ranks):
            outgoing, (_, incoming) = rank.edges()[0], ranks[(index + 1) % 3].edges()
            assert outgoing["messages"] == incoming["messages"] == (8 if index == 0 else 4)
            assert outgoing["bytes"] == incoming["bytes"] > outgoing["messages"] * 4096
            assert (outgoing["source"], outgoing["destination"]) == (incoming["source"], incoming["destination"])
            assert incoming["progress_ns"] > 0


@pytest.mark.parametrize("kind", ENGINES)
def test_a_link_is_slowed_stalled_and_freed_while_it_runs(kind: str) -> None:
    count = 1 << 19
    with Ring(2, kind, piece_bytes=1 << 17) as ranks:
        assert together(ranks, lambda rank: rank.run(torch.ones(count))) == [None] * 2
        ranks[0].controls.pace(12, 10_000_000)
        assert together(ranks, lambda rank: rank.run(torch.ones(count), 2)) == [None] * 2
        slow, quick = ranks[1].edges()[1], ranks[0].edges()[1]
        assert slow["transfer_ns"] + slow["wait_ns"] > 0.1e9  # 2 MiB at 10 MB/s take 0.2 s
        assert slow["transfer_ns"] > 3 * quick["transfer_ns"]
        ranks[0].controls.stall(12)
        opened = threading.Timer(0.3, ranks[0].controls.free, (12,))
        opened.start()
        began = time.monotonic()
        assert together(ranks, lambda rank: rank.run(torch.ones(8), 3)) == [None] * 2
        assert time.monotonic() - began >= 0.25
        opened.join()
        ranks[1].transport.set_pacing(50_000_000)
        assert ranks[1].transport.outgoing.getsockopt(socket.SOL_SOCKET, 47) == 50_000_000


@pytest.mark.parametrize("kind", ENGINES)
def test_a_stalled_link_has_begun_a_message_that_its_receiver_lacks(kind: str) -> None:
    """Also when it was stalled before the operation's first message: sums go through the ranks in order, so that behind the
    first of them nobody has anything to send."""
    with Ring(4, kind) as ranks:
        assert together(ranks, lambda rank: rank.run(torch.ones(100))) == [None] * 4
        ranks[0].controls.stall(12)
        gaps: list[list[int]] = []

        def look_and_free() -> None:
            out, into = zip(*(rank.edges() for rank in ranks), strict=True)
            gaps.append([int(out[at]["messages"]) - int(into[(at + 1) % 4]["messages"]) for at in range(4)])
            ranks[0].controls.free(12)

        timer = threading.Timer(0.3, look_and_free)
        timer.start()
        assert together(ranks, lambda rank: rank.run(torch.ones(9000), 2)) == [None] * 4
        timer.join()
        assert gaps == [[1, 0, 0, 0]]
        assert all(rank.edges()[0]["messages"] == ranks[(at + 1) % 4].edges()[1]["messages"]
                   for at, rank in enumerate(ranks))  # fmt: skip


def test_a_connection_leaves_from_the_port_that_was_asked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    asked: list[tuple[int, int]] = []

    def choose(source: int, destination: int) -> int | None:
        asked.append((source, destination))
        return port if source == 10 else None

    with Ring(2, "python", source_port=choose) as ranks:
        assert ranks[0].transport.outgoing.getsockname()[1] == port
        assert ranks[1].transport.incoming.getpeername()[1] == port
    assert sorted(asked) == [(10, 12), (12, 10)]


def test_a_port_that_is_taken_is_an_error_that_names_it() -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        store = DictStore()
        options = RingOptions(source_port=lambda source, _: port if source == 10 else None)
        ranks = [
            Rank(RingTransport(store, rank, (10, 12), options, LinkControls.create(None, 64), "g"), None, None, None)  # type: ignore[arg-type]
            for rank in range(2)
        ]
        raised = together(ranks, lambda rank: rank.transport.connect(2))
        assert isinstance(raised[0], CollectiveError)
        assert f"source port {port}" in str(raised[0])


def test_a_stranger_at_the_door_is_sent_away() -> None:
    store = DictStore()
    options = RingOptions(address="127.0.0.1")
    ranks = [
        Rank(RingTransport(store, rank, (10, 12), options, LinkControls.create(None, 64), "g"), None, None, None)  # type: ignore[arg-type]
        for rank in range(2)
    ]
    turned_away = []

    def connect(rank: Rank) -> None:
        if rank is ranks[1]:
            rank.transport.connect(20)
            return
        store.set("c4/host/0", "elsewhere")  # so that rank 1 opens its door before rank 0 comes
        while "c4/ring/1" not in store.values:
            time.sleep(0.005)
        address, port, _ = store.values["c4/ring/1"].decode().split()
        with socket.create_connection((address, int(port))) as stranger:  # is first in the queue
            stranger.sendall(b"0" * 32)
            rank.transport.connect(20)
            try:
                turned_away.append(stranger.recv(1) == b"")
            except ConnectionError:
                turned_away.append(True)

    assert together(ranks, connect) == [None, None]
    assert turned_away == [True]
    assert ranks[1].transport.incoming.getpeername() == ranks[0].transport.outgoing.getsockname()
    for rank in ranks:
        rank.transport.close()


def test_a_neighbour_that_never_comes_is_named() -> None:
    transport = RingTransport(DictStore(), 0, (10, 12, 14), RingOptions(), LinkControls.create(None, 64), "grp")
    with pytest.raises(CollectiveTimeoutError, match="Rank 14 did not come to the ring of group grp"):
        transport.connect(0.05)


@pytest.mark.parametrize("kind", ENGINES)
def test_different_operations_are_told_at_all_ranks_and_change_no_data(kind: str) -> None:
    with Ring(4, kind) as ranks:
        tensors = [torch.full((4000 + (1 if rank == 2 else 0),), float(rank)) for rank in range(4)]
        own = {id(rank): tensor for rank, tensor in zip(ranks, tensors, strict=True)}
        raised = together(ranks, lambda rank: rank.run(own[id(rank)]))
        assert [type(error) for error in raised] == [MismatchError] * 4
        for error in raised:
            assert "16,000 bytes" in str(error)
            assert "16,004 bytes" in str(error)
            assert "rank 14" in str(error)
        again = together(ranks, lambda rank: _refused(rank))
        assert [type(error) for error in again] == [MismatchError] * 4


def _refused(rank: Rank) -> None:
    """What the group does before each operation of a broken ring."""
    from actors.c4.recorder.failing import error_kind

    assert rank.transport.error is not None
    raise error_kind(rank.transport.error)(rank.transport.error)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_lost_peer_is_named_at_every_rank_at_once(kind: str) -> None:
    with Ring(4, kind) as ranks:
        assert together(ranks, lambda rank: rank.run(torch.ones(100))) == [None] * 4
        threading.Timer(0.2, ranks[2].transport.close).start()
        began = time.monotonic()
        raised = together(ranks, lambda rank: rank.run(torch.ones(100_000), 2), but=2)
        assert time.monotonic() - began < 20  # not the timeout of 30 s
        assert [type(raised[rank]) for rank in (0, 1, 3)] == [PeerLostError] * 3
        assert all("rank 14 is gone" in str(raised[rank]) for rank in (0, 1, 3))


@pytest.mark.parametrize("kind", ENGINES)
def test_a_rank_that_has_all_it_needs_may_leave_before_the_others(kind: str) -> None:
    with Ring(3, kind) as ranks:
        ranks[1].controls.stall(14)
        tensors = {id(rank): torch.full((5000,), float(number)) for number, rank in enumerate(ranks)}

        def run(rank: Rank) -> None:
            rank.run(tensors[id(rank)], op=OpType.BROADCAST)
            if rank is ranks[0]:  # the root; its predecessor, rank 14, still waits for rank 12
                rank.transport.close()
                threading.Timer(0.2, ranks[1].controls.free, (14,)).start()

        assert together(ranks, run) == [None] * 3
        assert all(not tensor.any() for tensor in tensors.values())
        raised = together(ranks, lambda rank: rank.run(torch.ones(5000), 2), but=0)
        assert [type(error) for error in raised] == [type(None), PeerLostError, PeerLostError]


@pytest.mark.parametrize("kind", ENGINES)
def test_at_the_timeout_the_rank_that_has_not_come_is_named_at_every_rank(kind: str) -> None:
    with Ring(4, kind) as ranks:
        raised = together(ranks, lambda rank: rank.run(torch.ones(100_000), timeout_s=0.3), but=1)
        assert [type(raised[rank]) for rank in (0, 2, 3)] == [CollectiveTimeoutError] * 3
        assert all("rank 12 has not entered the operation" in str(raised[rank]) for rank in (0, 2, 3))


@pytest.mark.parametrize("kind", ENGINES)
def test_bytes_that_are_no_message_of_the_ring_are_refused(kind: str) -> None:
    with Ring(2, kind) as ranks:
        ranks[0].transport.outgoing.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        raised = together(ranks, lambda rank: rank.run(torch.ones(10)), but=0)
        assert type(raised[1]) is CollectiveError
        assert "does not belong" in str(raised[1])


def test_link_controls_are_checked_and_reach_from_another_mapping(tmp_path) -> None:
    from actors.c4.recorder.errors import RingFormatError

    path = tmp_path / "x.links"
    mine = LinkControls.create(path, 4)
    with pytest.raises(ValueError, match="no rank 4"):
        mine.stall(4)
    with pytest.raises(ValueError, match="positive"):
        mine.pace(1, 0)
    other = LinkControls.open(path)
    other.pace(3, 1000)
    other.stall(2)
    assert [mine.get(rank) for rank in range(4)] == [0, 0, -1, 1000]
    other.free(3)
    assert mine.get(3) == 0
    other.close()
    path.write_bytes(b"nothing of ours")
    with pytest.raises(RingFormatError):
        LinkControls.open(path)
