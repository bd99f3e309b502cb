"""Own work, wait and lateness of blocks, on operations whose times are worked out by hand (milliseconds)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from actors.c4.monitors.block_sums import BlockSums
from actors.c4.recorder.records import EDGE_RECORD, OP_RECORD, OpFlag

MS = 1_000_000


def operations(*rows: tuple[int, int, float, float, int]) -> np.ndarray:
    """(op_id, sequence, enter, end, communicator)."""
    table = np.zeros(len(rows), dtype=OP_RECORD)
    for place, (op_id, sequence, enter, end, communicator) in enumerate(rows):
        table[place]["op_id"], table[place]["sequence"], table[place]["communicator"] = op_id, sequence, communicator
        table[place]["enter_ns"], table[place]["end_ns"] = int(enter * MS), int(end * MS)
    return table


def edges(*rows: tuple[int, int, int, int, float, float]) -> np.ndarray:
    """(op_id, source, destination, bytes, transfer, lateness)."""
    table = np.zeros(len(rows), dtype=EDGE_RECORD)
    for place, (op_id, source, destination, count, transfer, lateness) in enumerate(rows):
        table[place]["op_id"], table[place]["source"], table[place]["destination"] = op_id, source, destination
        table[place]["bytes"], table[place]["transfer_ns"] = count, int(transfer * MS)
        table[place]["lateness_ns"] = int(lateness * MS)
    return table


NO_EDGES = edges()


def test_a_block_of_waited_operations() -> None:
    sums = BlockSums(0)
    # 10 ms of work before each, 5 ms in each; what came before the first is not known.
    sums.add(operations(*[(n, n, 15 * n, 15 * n + 5, 0) for n in range(1, 5)]), NO_EDGES)
    ((communicator, block, work_s, wait_s, lateness_s),), links = sums.take()
    assert (communicator, block) == (0, 0)
    assert work_s == pytest.approx(0.010)
    assert wait_s == pytest.approx(0.005)
    assert math.isnan(lateness_s)
    assert links == []
    assert sums.take() == ([], [])


def test_it_does_not_matter_in_which_portions_the_records_come() -> None:
    rows = operations(*[(n, n, 15 * n, 15 * n + 5, 0) for n in range(1, 9)])
    whole, parts = BlockSums(0), BlockSums(0)
    whole.add(rows, NO_EDGES)
    for place in range(len(rows)):
        parts.add(rows[place : place + 1], NO_EDGES)
    assert whole.take() == parts.take()


def test_work_under_operations_that_run_by_themselves_counts_from_their_entry() -> None:
    """As DDP does it: a bucket is reduced while the backward pass goes on to the next one."""
    sums = BlockSums(0)
    # Entered at 10, 30, 60, 100; each takes 25 ms: the second is entered while the first runs.
    sums.add(operations((1, 1, 10, 35, 0), (2, 2, 30, 55, 0), (3, 3, 60, 85, 0), (4, 4, 100, 125, 0)), NO_EDGES)
    ((_, _, work_s, _, _),), _ = sums.take()
    # 10->30 (the first still runs): 20; 55->60: 5; 85->100: 15.
    assert work_s == pytest.approx((20 + 5 + 15) / 3 / 1e3)


def test_the_previous_operation_may_be_of_another_group() -> None:
    sums = BlockSums(0)
    rows = []
    for n in range(4):
        start = 100 * n + 1
        rows += [(2 * n + 1, n + 1, start, start + 10, 0), (2 * n + 2, n + 1, start + 40, start + 50, 1)]
    sums.add(operations(*rows), NO_EDGES)
    blocks, _ = sums.take()
    by_group = {communicator: work_s for communicator, _, work_s, _, _ in blocks}
    assert by_group[1] == pytest.approx(0.030)
    assert by_group[0] == pytest.approx(0.050)


def test_links_and_lateness_are_the_receivers() -> None:
    sums = BlockSums(1)
    rows = operations(*[(n, n, 15 * n, 15 * n + 5, 0) for n in range(1, 5)])
    seen = [(n, 0, 1, 1000, 2.0, 3.0) for n in range(1, 5)] + [(n, 1, 2, 7777, 9.0, 0.0) for n in range(1, 5)]
    sums.add(rows, edges(*seen))
    ((_, _, _, _, lateness_s),), links = sums.take()
    assert lateness_s == pytest.approx(0.003)
    assert links == [(0, 0, 1, 0, 4000, pytest.approx(0.008))]


def test_a_block_whose_beginning_was_missed_is_dropped() -> None:
    sums = BlockSums(0)
    sums.add(operations(*[(n, n, 15 * n, 15 * n + 5, 0) for n in range(3, 9)]), NO_EDGES)
    blocks, _ = sums.take()
    assert [block for _, block, *_ in blocks] == [1]


def test_a_failed_operation_makes_no_block() -> None:
    sums = BlockSums(0)
    rows = operations(*[(n, n, 15 * n, 15 * n + 5, 0) for n in range(1, 5)])
    rows[2]["flags"] = OpFlag.FAILED
    sums.add(rows, NO_EDGES)
    assert sums.take() == ([], [])
