"""Plans of the ring collectives, walked through hop by hop on plain numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.c4.recorder.plan import arrivals, departures, make_plan
from actors.c4.recorder.records import OpType

ITEM = 4


def walk(op: OpType, values: list[list[str]], **options) -> list[list[str]]:
    """Every rank's buffer after the plan; values are words, and adding writes "(incoming+own)"."""
    size = len(values)
    buffers = [list(row) for row in values]
    plan = make_plan(op, len(values[0]) * ITEM, ITEM, 0, size, **options)
    for piece in plan.rows:
        low, high = piece.offset // ITEM, (piece.offset + piece.length) // ITEM
        travelling = buffers[piece.start][low:high]
        for hop in range(1, piece.hops + 1):
            rank = (piece.start + hop) % size
            if hop <= piece.accumulate:
                travelling = [f"({a}+{b})" for a, b in zip(travelling, buffers[rank][low:high], strict=True)]
            buffers[rank][low:high] = travelling
    return buffers


def words(size: int, count: int) -> list[list[str]]:
    return [[f"{'abcdefgh'[rank]}{index}" for index in range(count)] for rank in range(size)]


sizes = st.integers(2, 8)


@given(sizes, st.integers(1, 40), st.integers(1, 64))
def test_ordered_all_reduce_adds_every_element_in_rank_order_wherever_it_lies(
    size: int, count: int, piece: int
) -> None:
    result = walk(OpType.ALL_REDUCE, words(size, count), piece_bytes=piece)
    for index in range(count):
        wanted = f"a{index}"
        for rank in range(1, size):
            wanted = f"({wanted}+{'abcdefgh'[rank]}{index})"
        assert [row[index] for row in result] == [wanted] * size


@given(sizes, st.integers(1, 40), st.integers(1, 64))
def test_rotated_all_reduce_adds_every_rank_once_and_leaves_all_alike(size: int, count: int, piece: int) -> None:
    result = walk(OpType.ALL_REDUCE, words(size, count), piece_bytes=piece, rotated=True)
    assert all(row == result[0] for row in result)
    for index, value in enumerate(result[0]):
        assert sorted(value.replace("(", "").replace(")", "").split("+")) == [
            f"{'abcdefgh'[rank]}{index}" for rank in range(size)
        ]


@given(sizes, st.integers(1, 5), st.integers(4, 16))
def test_reduce_scatter_ends_with_chunk_c_at_rank_c(size: int, each: int, piece: int) -> None:
    result = walk(OpType.REDUCE_SCATTER, words(size, each * size), piece_bytes=piece)
    for rank in range(size):
        for index in range(rank * each, (rank + 1) * each):
            parts = result[rank][index].replace("(", "").replace(")", "").split("+")
            assert parts == [f"{'abcdefgh'[(rank + 1 + hop) % size]}{index}" for hop in range(size)]


@given(sizes, st.integers(1, 5), st.integers(4, 16))
def test_all_gather_and_broadcast_only_carry(size: int, each: int, piece: int) -> None:
    gathered = walk(OpType.ALL_GATHER, words(size, each * size), piece_bytes=piece)
    assert all(row == [f"{'abcdefgh'[index // each]}{index}" for index in range(each * size)] for row in gathered)
    root = size // 2
    sent = walk(OpType.BROADCAST, words(size, each), root=root, piece_bytes=piece)
    assert all(row == words(size, each)[root] for row in sent)


@given(
    sizes, st.sampled_from([OpType.ALL_REDUCE, OpType.REDUCE_SCATTER, OpType.ALL_GATHER, OpType.BROADCAST]), st.booleans(),
    st.integers(0, 6),
)  # fmt: skip
def test_what_one_rank_sends_the_next_one_receives(size: int, op: OpType, rotated: bool, each: int) -> None:
    plans = [
        make_plan(op, each * size * ITEM, ITEM, rank, size, piece_bytes=8, rotated=rotated) for rank in range(size)
    ]
    assert all(plan.rows == plans[0].rows for plan in plans)
    for rank, plan in enumerate(plans):
        assert plan.sends == plans[(rank + 1) % size].receives
        hops = [(piece, hop) for piece in plan.rows for hop in departures(piece.start, piece.hops, rank, size)]
        other = (rank + 1) % size
        assert hops == [(piece, hop) for piece in plan.rows for hop in arrivals(piece.start, piece.hops, other, size)]


@given(sizes, st.booleans())
def test_both_all_reduces_move_two_payloads_over_all_but_one_connection(size: int, rotated: bool) -> None:
    count = 8 * size
    plan = make_plan(OpType.ALL_REDUCE, count * ITEM, ITEM, 0, size, rotated=rotated, piece_bytes=16)
    assert sum(piece.length * piece.hops for piece in plan.rows) == 2 * (size - 1) * count * ITEM


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ValueError, match="equal chunks"):
        make_plan(OpType.ALL_GATHER, 12, 4, 0, 2)
    with pytest.raises(ValueError, match="GATHER"):
        make_plan(OpType.GATHER, 8, 4, 0, 2)
