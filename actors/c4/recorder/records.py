"""The vocabulary of a record: operation types, dtypes and the fixed layout of the records in a worker's ring.

Shared by the writer (the process group in the worker), the reader (the agent) and the diagnosis. No torch, no Ray.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class OpType(IntEnum):
    """A collective or point-to-point operation; 0 stands for none."""

    NONE = 0
    ALL_REDUCE = 1
    REDUCE_SCATTER = 2
    ALL_GATHER = 3
    BROADCAST = 4
    REDUCE = 5
    GATHER = 6
    SCATTER = 7
    ALL_TO_ALL = 8
    BARRIER = 9
    SEND = 10
    RECV = 11
    OTHER = 12


class ElementType(IntEnum):
    """dtype of the payload; 0 stands for none or mixed."""

    NONE = 0
    FLOAT32 = 1
    FLOAT64 = 2
    FLOAT16 = 3
    BFLOAT16 = 4
    INT8 = 5
    UINT8 = 6
    INT16 = 7
    INT32 = 8
    INT64 = 9
    BOOL = 10
    OTHER = 11


class OpFlag(IntEnum):
    """Bits of a record's ``flags``."""

    FAILED = 1
    ASYNC = 2
    RING = 4
    """Ran over the recorded ring: its connections have edge records."""
    MISMATCH = 8
    """A peer announced another operation under the same sequence number."""


OP_RECORD = np.dtype(
    [
        ("op_id", "<i8"),  # running number in the process, from 1; 0: never written. Written last.
        ("sequence", "<i8"),  # running number in the communicator, from 1
        ("bytes", "<i8"),  # of the payload at this rank
        ("enter_ns", "<i8"),  # CLOCK_MONOTONIC: the call
        ("start_ns", "<i8"),  # the transfer began; 0: not yet
        ("end_ns", "<i8"),  # 0: still open
        ("communicator", "<i4"),  # index in the ring's table
        ("peer", "<i4"),  # global rank of a root or partner; -1 for none
        ("op_type", "u1"),
        ("element_type", "u1"),
        ("flags", "<u2"),
        ("reserved", "<u4"),
    ]
)
"""One operation at one rank; 64 bytes."""

EDGE_RECORD = np.dtype(
    [
        ("op_id", "<i8"),  # of the operation at this rank
        ("sequence", "<i8"),
        ("bytes", "<i8"),  # moved on this connection in the operation so far
        ("lateness_ns", "<i8"),  # incoming: own start until the peer's announcement of the operation came
        ("wait_ns", "<i8"),  # incoming: waiting for first bytes of messages, announcement excluded
        ("transfer_ns", "<i8"),  # incoming: first byte to last byte, summed over messages
        ("progress_ns", "<i8"),  # CLOCK_MONOTONIC of the last byte moved
        ("communicator", "<i4"),
        ("source", "<i4"),  # global ranks
        ("destination", "<i4"),
        ("messages", "<i4"),  # incoming: received whole; outgoing: begun to be sent
    ]
)
"""One connection of one ring operation at one end of it; outgoing when ``source`` is this rank. 72 bytes."""
