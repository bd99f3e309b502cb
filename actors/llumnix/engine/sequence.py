"""One request's life inside an engine: its tokens, its block table, how far its keys and values are computed.

The scheduler moves sequences between states; the engine reads and appends tokens. Nothing here knows of tensors.
"""

from __future__ import annotations

import enum
from array import array
from itertools import count
from typing import Any

import numpy as np

from actors.llumnix.engine.block_manager import block_hash
from actors.llumnix.engine.request import Request
from actors.llumnix.engine.text import IncrementalText
from actors.llumnix.load import RequestLoad

_serial = count()


class SequenceState(enum.Enum):
    WAITING = "waiting"
    """In the queue; owns no blocks (also after a preemption)."""
    RUNNING = "running"
    DETACHED = "detached"
    """Out of the batch for the last stage of a migration; keeps its blocks."""


class Sequence:
    """A request with its output so far. Everything that follows from the tokens is derived, not carried."""

    __slots__ = (
        "arrival_time",
        "block_hashes",
        "block_table",
        "cached_tokens",
        "epoch",
        "num_computed",
        "num_migrations",
        "num_preemptions",
        "num_prompt",
        "num_registered",
        "order",
        "request",
        "request_id",
        "sampler_row",
        "sampling",
        "state",
        "stop_token_ids",
        "table_row",
        "text",
        "token_counts",
        "tokens",
        "was_running",
    )

    def __init__(self, request: Request, eos_token_ids: frozenset[int], max_blocks: int):
        self.request = request
        self.request_id = request.request_id
        self.sampling = request.sampling
        self.epoch = request.epoch
        self.arrival_time = request.arrival_time
        self.order = (-request.priority, request.arrival_time, next(_serial))
        """Sort key: urgent first, then first come first served."""
        self.tokens = array("q", request.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        self.tokens.extend(request.output_token_ids)
        self.num_computed = 0
        """Tokens whose keys and values are in the blocks."""
        self.block_table: list[int] = []
        self.table_row = np.zeros(max_blocks, dtype=np.int32)
        """``block_table`` as the array that batches are built from."""
        self.block_hashes: list[bytes] = []
        self.num_registered = 0
        """Leading blocks known to the prefix cache."""
        self.state = SequenceState.WAITING
        self.was_running = False
        """State to return to after a detach."""
        self.text = IncrementalText(request.sampling.stop, request.sampling.include_stop_str_in_output)
        self.stop_token_ids = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            self.stop_token_ids |= eos_token_ids
        self.sampler_row: Any = None
        """What the sampler packed of this request."""
        self.token_counts: Any = None
        """What the penalties see, made by the sampler if there are any: it follows from the tokens, so it never travels."""
        self.cached_tokens = 0
        self.num_preemptions = 0
        self.num_migrations = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        """Tokens generated so far, here or elsewhere."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Tokens to run through the model before the next one can be sampled: 1 when decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def output_token_ids(self) -> tuple[int, ...]:
        return tuple(self.tokens[self.num_prompt :])

    def append(self, token_id: int) -> None:
        """Take the sampled token."""
        self.tokens.append(token_id)
        if self.token_counts is not None:
            self.token_counts.append(token_id)

    def set_blocks(self, table: list[int]) -> None:
        """Use ``table`` (the block manager's list, shared with it) from now on."""
        self.block_table = table
        self.table_row[: len(table)] = table

    def hashes(self, num_blocks: int, block_size: int, root: bytes) -> list[bytes]:
        """Chained content hashes of at least the first ``num_blocks`` blocks, which must be full of tokens."""
        known = self.block_hashes
        for i in range(len(known), num_blocks):
            parent = known[-1] if known else root
            known.append(block_hash(parent, self.tokens[i * block_size : (i + 1) * block_size]))
        return known

    def load(self, block_size: int) -> RequestLoad:
        """For the instance's load: blocks held, or blocks needed to start."""
        blocks = len(self.block_table) or len(self.tokens) // block_size + 1
        return RequestLoad(
            self.request_id,
            blocks,
            self.request.priority,
            len(self.tokens),
            self.arrival_time,
            self.state is not SequenceState.WAITING and self.num_uncomputed <= 1,
        )
