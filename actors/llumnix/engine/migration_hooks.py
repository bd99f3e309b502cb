"""What a migrator asks of an engine: the source's and the destination's side of moving one request. No I/O here.

Every hook is called on the engine loop's thread between steps. The order of a migration, in the paper's stages:

    source                                   destination
    hold, full_blocks (each stage)           reserve (each stage), then the peer copies
    detach -> snapshot, computed_blocks      reserve for the rest, copy, attach
    release (committed) or reattach          cancel_reservation (in every other ending)
    unhold (in every ending)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

from actors.llumnix.engine.block_manager import BlockManager, Reservation
from actors.llumnix.engine.request import SequenceSnapshot, TokenChunk
from actors.llumnix.engine.scheduler import Scheduler
from actors.llumnix.engine.sequence import Sequence, SequenceState
from actors.llumnix.load import RequestLoad


class EngineError(RuntimeError):
    """A hook was called for a request that is not in the state it needs; nothing was changed."""


@dataclass(frozen=True)
class RequestStatus:
    """Where a request stands; lets the migrator see that it was preempted or ended between two stages."""

    state: str
    """``waiting``, ``running`` or ``detached``."""
    epoch: int
    num_tokens: int
    num_computed_tokens: int
    num_preemptions: int
    num_blocks: int
    """Blocks that hold its computed tokens."""


class MigrationHooks:
    """The migration side of ``Engine``."""

    blocks: BlockManager
    scheduler: Scheduler
    block_size: int
    max_blocks: int
    draining: bool
    eos_token_ids: frozenset[int]
    _sequences: dict[str, Sequence]
    _detached: dict[str, Sequence]
    _fences: OrderedDict[str, int]
    _chunks: list[TokenChunk]

    # ---- source ----------------------------------------------------------------------------------------------------

    def status(self, request_id: str) -> RequestStatus | None:
        """Where the request stands; None if it is not here (ended, or never was)."""
        seq = self._sequences.get(request_id)
        if seq is None:
            return None
        return RequestStatus(
            seq.state.value,
            seq.epoch,
            len(seq.tokens),
            seq.num_computed,
            seq.num_preemptions,
            self.num_blocks(request_id),
        )

    def migration_candidates(self) -> tuple[RequestLoad, ...]:
        """Running requests that no migration touches, urgent and old ones first."""
        busy = {*self.blocks.holding, *self.blocks.reserving}
        return tuple(seq.load(self.block_size) for seq in self.scheduler.running if seq.request_id not in busy)

    def num_blocks(self, request_id: str) -> int:
        """Blocks that hold the request's computed tokens, the last one possibly partly."""
        return -(-self._get(request_id).num_computed // self.block_size)

    def full_blocks(self, request_id: str, first: int = 0) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
        """Ids and chained hashes of the full (immutable) blocks from block index ``first`` on."""
        seq = self._get(request_id)
        full = seq.num_computed // self.block_size
        hashes = seq.hashes(full, self.block_size, self.scheduler.root_hash)
        return tuple(seq.block_table[first:full]), tuple(hashes[first:full])

    def computed_blocks(self, request_id: str, first: int = 0) -> tuple[int, ...]:
        """Ids of the blocks that hold computed tokens from block index ``first`` on, the partly filled last one included.

        Only of use while the request is detached: the last block of a running one is being written.
        """
        return tuple(self._get(request_id).block_table[first : self.num_blocks(request_id)])

    def hold(self, request_id: str) -> int:
        """Keep the request's present blocks referenced while a peer reads them, even if it ends or is preempted.

        Call again after it grew. Returns the number of blocks held.
        """
        self._get(request_id)
        return self.blocks.hold(request_id)

    def unhold(self, request_id: str) -> bool:
        """The peer has read what it needs (or never will); False if nothing was held."""
        return self.blocks.unhold(request_id)

    def detach(self, request_id: str) -> SequenceSnapshot:
        """Take the request out of the batch or the queue; it keeps its blocks until ``release`` or ``reattach``.

        A waiting request has no blocks: its snapshot has ``num_computed_tokens == 0`` and is simply queued at the
        destination. ``unacked`` is left empty: the outbox fills it in.
        """
        seq = self._get(request_id)
        if seq.state is SequenceState.DETACHED:
            raise EngineError(f"request {request_id} is already detached")
        seq.was_running = seq.state is SequenceState.RUNNING
        self.scheduler.leave(seq)
        seq.state = SequenceState.DETACHED
        self._detached[request_id] = seq
        self._count_slots()
        return SequenceSnapshot(
            request=replace(seq.request, epoch=seq.epoch),
            output_token_ids=seq.output_token_ids,
            num_computed_tokens=seq.num_computed,
            block_hashes=tuple(seq.block_hashes[: seq.num_computed // self.block_size]),
            text_state=seq.text.state(),
            num_preemptions=seq.num_preemptions,
            cached_tokens=seq.cached_tokens,
            num_migrations=seq.num_migrations,
        )

    def reattach(self, request_id: str, epoch: int) -> bool:
        """The migration did not happen: go on here under ``epoch``. False if the request was aborted meanwhile."""
        seq = self._get_detached(request_id)
        seq.epoch = epoch
        del self._detached[request_id]
        aborted = epoch <= self._fences.get(request_id, -1)
        if aborted:
            self._forget(seq)
        elif seq.was_running:
            self.scheduler.join(seq)
        else:
            self.scheduler.add(seq)
        self._count_slots()
        return not aborted

    def release(self, request_id: str) -> None:
        """The destination owns the request: forget it and free its blocks (but for those on hold)."""
        self._forget(self._get_detached(request_id))

    # ---- destination -----------------------------------------------------------------------------------------------

    def reserve(self, request_id: str, num_blocks: int, prefix_hashes: Items[bytes] = ()) -> Reservation | None:
        """Promise blocks to a request on its way in, or make an earlier promise at least ``num_blocks`` long.

        ``prefix_hashes`` are those of its leading full blocks: what the prefix cache already has is shared and needs no
        copy (``num_cached``; settled at the first call). None, and nothing changed, if there is no room.
        """
        if self.blocks.reservation(request_id) is not None:
            return self.blocks.reserve(request_id, num_blocks)
        if self.draining or request_id in self._sequences or not self.scheduler.has_slot():
            return None
        if num_blocks > self.max_blocks:
            return None
        reservation = self.blocks.reserve(request_id, num_blocks, prefix_hashes, self.blocks.watermark_blocks)
        self._count_slots()
        return reservation

    def cancel_reservation(self, request_id: str) -> bool:
        """The migration did not happen: give the blocks back. False if there was no reservation."""
        cancelled = self.blocks.cancel_reservation(request_id)
        self._count_slots()
        return cancelled

    def attach(self, snapshot: SequenceSnapshot, epoch: int) -> None:
        """Own the request from now on, under ``epoch``, with the keys and values that were copied into its reservation.

        It runs in the next step, keeping arrival time and priority. Without computed tokens it is queued instead. Raises
        EngineError, leaving the reservation to be cancelled, if the epoch was ended here, the request is here, or the
        reservation does not cover the computed tokens.
        """
        request_id = snapshot.request.request_id
        if epoch <= self._fences.get(request_id, -1):
            raise EngineError(f"request {request_id} was aborted before epoch {epoch} arrived")
        if request_id in self._sequences:
            raise EngineError(f"request {request_id} is already here")
        request = replace(snapshot.request, epoch=epoch, output_token_ids=snapshot.output_token_ids)
        seq = Sequence(request, self.eos_token_ids, self.max_blocks)
        needed = -(-snapshot.num_computed_tokens // self.block_size)
        reserved = self.blocks.reservation(request_id)
        have = 0 if reserved is None else len(reserved.block_ids)
        if have < needed:
            raise EngineError(f"request {request_id} arrives with {needed} blocks and has {have} reserved")
        longest = seq.num_prompt + seq.sampling.max_tokens
        if longest > self.max_blocks * self.block_size:
            raise EngineError(f"request {request_id} may grow to {longest} tokens, more than this instance can hold")
        seq.text.restore(snapshot.text_state)
        seq.num_preemptions = snapshot.num_preemptions
        seq.cached_tokens = snapshot.cached_tokens
        seq.num_migrations = snapshot.num_migrations + 1
        self._sequences[request_id] = seq
        if needed:
            keep = max(needed, min(have, len(seq.tokens) // self.block_size + 1))
            seq.set_blocks(self.blocks.adopt_reservation(request_id, keep))
            seq.num_computed = snapshot.num_computed_tokens
            seq.block_hashes = list(snapshot.block_hashes)
            self.scheduler.register_full_blocks(seq)
            self.scheduler.join(seq)
        else:
            self.blocks.cancel_reservation(request_id)
            self.scheduler.add(seq)
        self._count_slots()

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _forget(self, seq: Sequence) -> None:
        raise NotImplementedError

    def _get(self, request_id: str) -> Sequence:
        seq = self._sequences.get(request_id)
        if seq is None:
            raise EngineError(f"request {request_id} is not here")
        return seq

    def _get_detached(self, request_id: str) -> Sequence:
        seq = self._get(request_id)
        if seq.state is not SequenceState.DETACHED:
            raise EngineError(f"request {request_id} is {seq.state.value}, not detached")
        return seq

    def _count_slots(self) -> None:
        """Places in the batch that detached and arriving sequences will claim."""
        self.scheduler.slots_taken = len(self._detached) + len(self.blocks.reserving)
