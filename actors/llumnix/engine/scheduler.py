"""Who runs in the next step: continuous batching with chunked prefill, preemption by recompute, priority then FCFS.

``schedule()`` says what to run, ``postprocess()`` takes what came back; the engine runs the model in between.

Progress: the first sequence in order can take the blocks of every other one, and no request is admitted that could not
run alone, so the first one always ends. Blocks that migrations hold (reservations, holds, detached sequences) come back
within the migrations' time-outs.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from actors.llumnix.engine.block_manager import BlockManager
from actors.llumnix.engine.sequence import Sequence, SequenceState


def _order(seq: Sequence) -> tuple[int, float, int]:
    return seq.order


@dataclass
class Plan:
    """One step: ``counts[i]`` tokens of ``sequences[i]``, decodes first."""

    sequences: list[Sequence] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    num_decodes: int = 0
    num_tokens: int = 0
    num_preempted: int = 0


class Scheduler:
    """Sorted lists of running and waiting sequences over one block manager."""

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_batched_tokens: int, root_hash: bytes = b""):
        self.blocks = blocks
        self.block_size = blocks.block_size
        # Every decode costs one token, and one must be left for a prefill to go on.
        self.max_num_seqs = min(max_num_seqs, max_batched_tokens)
        self.max_batched_tokens = max_batched_tokens
        self.root_hash = root_hash
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.slots_taken = 0
        """Places in the batch kept for detached sequences and reservations."""
        self.num_preemptions = 0
        self.waiting_version = 0
        """Changes whenever the waiting queue does."""

    # ---- one step --------------------------------------------------------------------------------------------------

    def schedule(self) -> Plan:
        """Choose this step's tokens: all decodes, then prefill chunks, then new requests, within max_batched_tokens."""
        plan = Plan()
        budget = self.max_batched_tokens
        for decoding in (True, False):
            for seq in self.running.copy():
                todo = seq.num_uncomputed
                if (todo == 1) is not decoding or not budget or seq.state is not SequenceState.RUNNING:
                    continue
                count = min(todo, budget)
                if not self._make_room(seq, seq.num_computed + count, plan):
                    continue
                budget -= self._put(plan, seq, count)
            if decoding:
                plan.num_decodes = len(plan.sequences)
        if not plan.num_preempted:
            self._admit(plan, budget)
        return plan

    def postprocess(self, plan: Plan, sampled: list[int]) -> list[Sequence]:
        """Book the computed tokens and append ``sampled`` to the sequences that got logits; returns these."""
        done: list[Sequence] = []
        for seq, num in zip(plan.sequences, plan.counts, strict=True):
            seq.num_computed += num
            if seq.num_computed // self.block_size > seq.num_registered:
                self.register_full_blocks(seq)
            if seq.num_computed == len(seq.tokens):
                seq.append(sampled[len(done)])
                done.append(seq)
        return done

    # ---- entering and leaving --------------------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Queue a sequence without blocks."""
        seq.state = SequenceState.WAITING
        insort(self.waiting, seq, key=_order)
        self.waiting_version += 1

    def join(self, seq: Sequence) -> None:
        """Put a sequence with blocks into the batch: it runs in the next step."""
        seq.state = SequenceState.RUNNING
        insort(self.running, seq, key=_order)

    def leave(self, seq: Sequence) -> None:
        """Take a sequence out of batch or queue; its blocks stay its own."""
        if seq.state is SequenceState.RUNNING:
            self.running.remove(seq)
        elif seq.state is SequenceState.WAITING:
            self.waiting.remove(seq)
            self.waiting_version += 1

    def has_slot(self) -> bool:
        """Whether one more sequence may run."""
        return len(self.running) + self.slots_taken < self.max_num_seqs

    def register_full_blocks(self, seq: Sequence) -> None:
        """Make the sequence's full, computed blocks known to the prefix cache."""
        full = seq.num_computed // self.block_size
        if self.blocks.prefix_caching:
            hashes = seq.hashes(full, self.block_size, self.root_hash)
            for i in range(seq.num_registered, full):
                self.blocks.register(seq.block_table[i], hashes[i])
        seq.num_registered = full

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _put(self, plan: Plan, seq: Sequence, count: int) -> int:
        plan.sequences.append(seq)
        plan.counts.append(count)
        plan.num_tokens += count
        return count

    def _make_room(self, seq: Sequence, num_tokens: int, plan: Plan) -> bool:
        """Give ``seq`` blocks for its first ``num_tokens`` positions, preempting from the end of the order if need be.

        False if ``seq`` itself was preempted. Sequences of this step's plan are safe: decodes come in order before
        their victims, and a prefill's victims are checked against the plan.
        """
        missing = -(-num_tokens // self.block_size) - len(seq.block_table)
        if missing <= 0:
            return True
        while not self.blocks.can_allocate(missing):
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is seq:
                return False
        start = len(seq.block_table)
        seq.table_row[start : start + missing] = self.blocks.grow_table(seq.request_id, missing)
        return True

    def _preempt(self, victim: Sequence, plan: Plan) -> None:
        """Give up the victim's blocks; its prompt and output will be prefilled again (the prefix cache may help)."""
        if victim in plan.sequences:
            i = plan.sequences.index(victim)
            del plan.sequences[i]
            plan.num_tokens -= plan.counts.pop(i)
            plan.num_decodes -= i < plan.num_decodes
        self.leave(victim)
        self.drop_blocks(victim)
        victim.num_preemptions += 1
        self.num_preemptions += 1
        plan.num_preempted += 1
        self.add(victim)

    def drop_blocks(self, seq: Sequence) -> None:
        """Free the sequence's blocks; nothing of it is computed any more."""
        self.blocks.close_table(seq.request_id)
        seq.block_table = []
        seq.table_row[:] = 0
        seq.num_computed = seq.num_registered = 0

    def _admit(self, plan: Plan, budget: int) -> None:
        """Start waiting requests in order while tokens, places and blocks last. All blocks of the prompt are taken at once."""
        coming: set[bytes] = set()
        for seq, num in zip(plan.sequences[plan.num_decodes :], plan.counts[plan.num_decodes :], strict=True):
            self._note_coming(coming, seq, num)
        while self.waiting and budget and self.has_slot():
            seq = self.waiting[0]
            shared: list[int] = []
            if self.blocks.prefix_caching:
                # The last token always runs, because its logits are wanted.
                usable = (len(seq.tokens) - 1) // self.block_size
                hashes = seq.hashes(usable, self.block_size, self.root_hash)[:usable]
                shared = self.blocks.match(hashes)
                if len(shared) < usable and hashes[len(shared)] in coming:
                    break  # Another sequence computes this very block in this step; share it in the next.
            needed = len(seq.tokens) // self.block_size + 1 - len(shared)
            alone = not self.running
            if not self.blocks.can_allocate(needed, shared, 0 if alone else self.blocks.watermark_blocks):
                break
            self.leave(seq)
            seq.set_blocks(self.blocks.open_table(seq.request_id, shared, needed))
            seq.num_computed = len(shared) * self.block_size
            seq.num_registered = len(shared)
            if not seq.num_preemptions:
                seq.cached_tokens = min(seq.num_computed, seq.num_prompt)
            self.join(seq)
            count = min(seq.num_uncomputed, budget)
            budget -= self._put(plan, seq, count)
            self._note_coming(coming, seq, count)

    def _note_coming(self, coming: set[bytes], seq: Sequence, count: int) -> None:
        """Add the hashes of the blocks that the step will fill to ``coming``."""
        if self.blocks.prefix_caching:
            full = (seq.num_computed + count) // self.block_size
            coming.update(seq.hashes(full, self.block_size, self.root_hash)[seq.num_computed // self.block_size : full])
