"""The ring in shared memory: what one process writes, another reads whole, in any state of the writer."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.c4.recorder.errors import RecorderError, RingFormatError
from actors.c4.recorder.files import clean_stale, side_file
from actors.c4.recorder.layout import HEADER, Communicator, default_directory, parse_name, process_start, ring_path
from actors.c4.recorder.reader import RingReader, discover
from actors.c4.recorder.records import EDGE_RECORD, OP_RECORD, ElementType, OpFlag, OpType
from actors.c4.recorder.ring import RingWriter, new_ring


def make(folder: Path, rank: int = 1, **capacities: int) -> RingWriter:
    return new_ring(folder, "job/7", 3, rank, 4, **capacities)


def path_of(ring: RingWriter) -> Path:
    assert ring.path is not None
    return ring.path


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    ring = make(tmp_path)
    group = ring.add_communicator(Communicator("0", "dp", (0, 1, 2, 3)))
    op = ring.enter(group, 5, OpType.ALL_REDUCE, ElementType.BFLOAT16, 4096, 2, OpFlag.RING | OpFlag.ASYNC)
    ring.start(op)
    outgoing, incoming = ring.open_edges(op, 5, group, 0, 1, 2)
    outgoing.begun()
    outgoing.moved(100, 11)
    incoming.late(7)
    incoming.moved(60, 12)
    incoming.moved(40, 13)
    incoming.received(3, 9)
    incoming.received(2, 1)
    with RingReader(path_of(ring)) as reader:
        identity, seen = reader.identity, reader.read()
        assert (identity.run, identity.generation, identity.rank, identity.world_size) == ("job/7", 3, 1, 4)
        assert identity.pid == os.getpid()
        assert identity.alive()
        assert seen.communicators == (Communicator("0", "dp", (0, 1, 2, 3)),)
        (record,) = seen.operations
        assert (record["op_id"], record["sequence"], record["bytes"], record["peer"]) == (op, 5, 4096, 2)
        assert (record["op_type"], record["element_type"]) == (OpType.ALL_REDUCE, ElementType.BFLOAT16)
        assert record["flags"] == OpFlag.RING | OpFlag.ASYNC
        assert 0 < record["enter_ns"] <= record["start_ns"] <= seen.at_ns
        assert record["end_ns"] == 0
        assert list(seen.open_operations["op_id"]) == [op]
        sent, got = seen.edges
        assert (sent["source"], sent["destination"], sent["bytes"], sent["messages"], sent["progress_ns"]) == (
            1,
            2,
            100,
            1,
            11,
        )
        assert (got["source"], got["destination"], got["bytes"], got["messages"], got["progress_ns"]) == (
            0,
            1,
            100,
            2,
            13,
        )
        assert (got["lateness_ns"], got["wait_ns"], got["transfer_ns"]) == (7, 5, 10)
        ring.end(op, OpFlag.FAILED)
        ring.end(op)  # the second one changes nothing
        (record,) = reader.read().operations
        assert record["flags"] == OpFlag.RING | OpFlag.ASYNC | OpFlag.FAILED
        assert record["end_ns"] >= record["start_ns"]
        assert len(reader.read().open_operations) == 0
        assert reader.read().closed_ns == 0
        ring.close()
        assert reader.read().closed_ns > 0


def test_records_have_the_size_that_both_sides_agreed_upon() -> None:
    assert (OP_RECORD.itemsize, EDGE_RECORD.itemsize) == (64, 72)


def test_an_overrun_ring_holds_the_newest_and_says_how_many_were_missed(tmp_path: Path) -> None:
    ring = make(tmp_path, op_capacity=16, edge_capacity=8)
    for sequence in range(1, 41):
        op = ring.enter(0, sequence, OpType.BARRIER, 0, 0)
        ring.open_edges(op, sequence, 0, 0, 1, 2)
        ring.end(op)
    with RingReader(path_of(ring)) as reader:
        seen = reader.read()
        assert list(seen.operations["op_id"]) == list(range(25, 41))
        assert list(seen.edges["op_id"]) == [op for op in range(37, 41) for _ in range(2)]
        assert (seen.newest_op, seen.missed) == (40, 24)
        later = reader.read(after=30)
        assert list(later.operations["op_id"]) == list(range(31, 41))
        assert later.missed == 0
    ring.start(1)
    ring.end(1)  # overwritten long ago: its slot is another operation's now
    with RingReader(path_of(ring)) as reader:
        assert list(reader.read().operations["op_id"]) == list(range(25, 41))


def test_an_open_operation_is_read_however_old(tmp_path: Path) -> None:
    ring = make(tmp_path)
    hung = ring.enter(0, 1, OpType.ALL_GATHER, ElementType.FLOAT32, 8)
    ring.open_edges(hung, 1, 0, 0, 1, 2)
    done = [ring.enter(1, sequence, OpType.BARRIER, 0, 0) for sequence in range(1, 6)]
    for op in done:
        ring.end(op)
    with RingReader(path_of(ring)) as reader:
        seen = reader.read(after=done[-1])
        assert list(seen.operations["op_id"]) == [hung]
        assert list(seen.edges["op_id"]) == [hung, hung]


def test_no_torn_record_is_read_while_threads_write(tmp_path: Path) -> None:
    """Every field of a record says its sequence number: a mixture of two records would show."""
    ring = make(tmp_path, op_capacity=8, edge_capacity=8)
    stop = threading.Event()

    def write(thread: int) -> None:
        sequence = thread
        while not stop.is_set():
            sequence += 2
            op = ring.enter(sequence % 1000, sequence, sequence % 13, sequence % 12, sequence * 3, sequence % 77)
            ring.open_edges(op, sequence, sequence % 1000, sequence % 50, sequence % 60, sequence % 50)
            ring.end(op)

    writers = [threading.Thread(target=write, args=(number,)) for number in (0, 1)]
    for writer in writers:
        writer.start()
    seen = 0
    try:
        with RingReader(path_of(ring)) as reader:
            for _ in range(400):
                snapshot = reader.read()
                sequence = snapshot.operations["sequence"]
                seen += len(sequence)
                assert (snapshot.operations["communicator"] == sequence % 1000).all()
                assert (snapshot.operations["op_type"] == sequence % 13).all()
                assert (snapshot.operations["element_type"] == sequence % 12).all()
                assert (snapshot.operations["bytes"] == sequence * 3).all()
                assert (snapshot.operations["peer"] == sequence % 77).all()
                assert len(np.unique(snapshot.operations["op_id"])) == len(sequence)
                edge = snapshot.edges["sequence"]
                ends = np.sort([snapshot.edges["source"], snapshot.edges["destination"]], axis=0)
                assert (ends == np.sort([edge % 50, edge % 60], axis=0)).all()
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert seen > 400


def test_a_record_under_writing_is_left_out(tmp_path: Path) -> None:
    ring = make(tmp_path)
    ids = [ring.enter(0, sequence, OpType.BARRIER, 0, 0) for sequence in (1, 2)]
    with RingReader(path_of(ring)) as reader:
        np.frombuffer(ring.map, dtype=OP_RECORD, offset=ring.sizes.operations, count=8)["op_id"][ids[0]] = 0
        seen = reader.read()
        assert list(seen.operations["op_id"]) == [ids[1]]
        assert seen.missed == 1


@given(
    st.dictionaries(st.text(max_size=20), st.tuples(st.sampled_from(["dp", "tp", ""]), st.integers(1, 40)), max_size=12)
)
def test_the_table_of_communicators_comes_back(rows: dict[str, tuple[str, int]]) -> None:
    wanted = [Communicator(name, role, tuple(range(size))) for name, (role, size) in rows.items()]
    with tempfile.TemporaryDirectory() as folder:
        ring = make(Path(folder))
        with RingReader(path_of(ring)) as reader:
            for number, one in enumerate(wanted):
                assert ring.add_communicator(one) == number
                assert ring.add_communicator(one) == number
                assert reader.read().communicators == tuple(wanted[: number + 1])


def test_a_full_table_costs_names_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ring = make(tmp_path, table_capacity=1024)
    found = [ring.add_communicator(Communicator(f"group-{number}", "", tuple(range(8)))) for number in range(100)]
    assert found[0] == 0
    assert found[-1] == -1
    assert len(caplog.records) == 1
    ring.enter(-1, 1, OpType.BARRIER, 0, 0)
    with RingReader(path_of(ring)) as reader:
        assert len(reader.read().communicators) == max(found) + 1
        assert reader.read().operations["communicator"][0] == -1


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:100], "has 100 bytes"),
        (lambda data: b"NOTARING" + data[8:], "no ring"),
        (lambda data: data[:8] + b"\x63\0\0\0" + data[12:], "layout version 99"),
        (lambda data: data[:-4096], "truncated"),
        (lambda data: data[:240] + b"\xff" * 8 + data[248:], "no sense"),
        (lambda data: b"", "0 bytes"),
    ],
)
def test_what_is_no_ring_of_this_version_is_refused_with_a_reason(tmp_path: Path, damage, said: str) -> None:
    path = path_of(make(tmp_path))
    other = tmp_path / "other.ring"
    other.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RingFormatError, match=said):
        RingReader(other)


def test_the_file_name_says_whose_it_is(tmp_path: Path) -> None:
    path = ring_path(tmp_path, "a run/with.dots", 12, 345, 678)
    found = parse_name(path)
    assert found is not None
    assert (found.generation, found.rank, found.pid) == (12, 345, 678)
    assert parse_name(tmp_path / "else.txt") is None
    assert discover(tmp_path / "nowhere") == []


def test_rings_are_found_by_run_and_generation(tmp_path: Path) -> None:
    new_ring(tmp_path, "a", 1, 0, 2)
    new_ring(tmp_path, "a", 2, 0, 2)
    new_ring(tmp_path, "b", 1, 1, 2)
    assert [(one.run, one.generation, one.rank) for one in discover(tmp_path)] == [
        ("a", 1, 0),
        ("a", 2, 0),
        ("b", 1, 1),
    ]
    assert [one.generation for one in discover(tmp_path, run="a")] == [1, 2]
    assert [one.run for one in discover(tmp_path, generation=1)] == ["a", "b"]


def test_files_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    mine = path_of(make(tmp_path))
    child = subprocess.run(
        [sys.executable, "-c", "import sys; from pathlib import Path\nfrom actors.c4.recorder.ring import new_ring\n"
         "new_ring(Path(sys.argv[1]), 'job', 1, 0, 1)", str(tmp_path)], check=True,
    )  # fmt: skip
    assert child.returncode == 0
    dead = next(one.path for one in discover(tmp_path) if one.path != mine)
    side_file(dead, ".stack").write_text("")
    # A process that got the number of a dead one: the same pid, begun at another time.
    reused = ring_path(tmp_path, "job", 1, 3, os.getpid())
    data = bytearray(mine.read_bytes())
    np.frombuffer(data, dtype=HEADER, count=1)["process_start"] += 1
    reused.write_bytes(data)
    with RingReader(reused) as reader:
        assert not reader.identity.alive()
    assert clean_stale(tmp_path, keep_s=3600) == []
    assert sorted(clean_stale(tmp_path)) == sorted([dead, reused])
    assert list(tmp_path.iterdir()) == [mine]


def test_process_start_of_what_is_not_there() -> None:
    assert process_start(2**22 + 5) == 0
    assert process_start(os.getpid()) > 0


@pytest.mark.parametrize(
    "capacities", [{"op_capacity": 1000}, {"edge_capacity": 1}, {"table_capacity": 100}, {"op_capacity": 1 << 30}]
)
def test_capacities_that_make_no_ring_are_refused(tmp_path: Path, capacities: dict[str, int]) -> None:
    with pytest.raises(RecorderError):
        make(tmp_path, **capacities)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(RecorderError, match="another user"):
        make(tmp_path)


def test_the_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEXTANT_C4_DIR", str(tmp_path / "rings"))
    assert default_directory() == tmp_path / "rings"


def test_reading_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys, actors.c4.recorder.reader, actors.c4.recorder.files, actors.c4.recorder.links, actors.c4.recorder.recorder,"
        " actors.c4.recorder.nccl_reports, actors.c4.recorder.ring, actors.c4.recorder.transport;"
        "print([name for name in ('torch', 'ray') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
