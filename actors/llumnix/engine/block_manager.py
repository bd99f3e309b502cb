"""Paged KV memory as bookkeeping: which block of the pool belongs to whom, which are cached, which are free.

Stands between the scheduler (which asks for blocks) and the KV pool tensor (which it never sees): pure Python, no torch.

A block is *referenced* by any number of owners, or *cached* (nobody's, but its content is still known by its hash and may
be revived), or *free*. Owners are sequences' block tables, reservations of migrations on their way in, and holds of
migrations on their way out. Only full blocks get a hash; a full block never changes again, so sharing needs no copy.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass


class OutOfBlocks(RuntimeError):
    """Fewer free or evictable blocks than were asked for; nothing was taken."""


@dataclass(frozen=True)
class Reservation:
    """Blocks promised to a request that is migrating in; block j is for positions j*block_size and on."""

    block_ids: tuple[int, ...]
    num_cached: int
    """Leading blocks that were found in the prefix cache: they need no copy."""


@dataclass(frozen=True)
class BlockAudit:
    """Every block accounted for. ``leaked`` counts blocks whose state and owners contradict each other."""

    total: int
    free: int
    cached: int
    """Unreferenced, kept for the prefix cache, evictable."""
    referenced: int
    sequences: int
    """Sequences that own blocks."""
    reservations: int
    holds: int
    leaked: int
    problems: tuple[str, ...] = ()


def root_hash(numerics: str) -> bytes:
    """The parent of every first block's hash. Keys and values of other numerics are other content."""
    return hashlib.blake2b(numerics.encode(), digest_size=16).digest()


def block_hash(parent: bytes, token_ids: array[int]) -> bytes:
    """Content hash of a full block: 16 bytes of BLAKE2b over (parent's hash, the block's token ids as int64)."""
    return hashlib.blake2b(parent + token_ids.tobytes(), digest_size=16).digest()


class BlockManager:
    """Reference-counted blocks 0 ... num_blocks-1 of ``block_size`` tokens, with a prefix cache evicted in LRU order."""

    def __init__(self, num_blocks: int, block_size: int, watermark: float = 0.0, prefix_caching: bool = True):
        if num_blocks < 1:
            raise ValueError("the KV memory holds not even one block: raise kv_memory_mib")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.watermark_blocks = int(watermark * num_blocks)
        self.prefix_caching = prefix_caching
        self.tables: dict[str, list[int]] = {}
        self._reservations: dict[str, list[int]] = {}
        self._num_cached: dict[str, int] = {}
        self._holds: dict[str, list[int]] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._ref = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()
        """Cached and unreferenced, least recently used first."""

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now: free or evictable."""
        return len(self._free) + len(self._evictable)

    @property
    def num_reserved(self) -> int:
        """Blocks held by reservations of migrations on their way in."""
        return sum(map(len, self._reservations.values()))

    # ---- sequences -------------------------------------------------------------------------------------------------

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The cached blocks of the longest prefix of ``hashes``; takes no reference."""
        blocks: list[int] = []
        if self.prefix_caching:
            for digest in hashes:
                block = self._block_of.get(digest)
                if block is None:
                    break
                blocks.append(block)
        return blocks

    def can_allocate(self, num_new: int, shared: list[int] | None = None, spare: int = 0) -> bool:
        """Whether ``num_new`` blocks remain, beside ``shared`` ones to be revived, with ``spare`` left over."""
        revived = sum(1 for block in shared if self._ref[block] == 0) if shared else 0
        return self.num_available - revived - num_new >= spare

    def open_table(self, owner: str, shared: list[int], num_new: int) -> list[int]:
        """A new block table of ``shared`` blocks followed by ``num_new`` fresh ones. Raises OutOfBlocks."""
        if owner in self.tables:
            raise ValueError(f"request {owner} already has a block table")
        self.tables[owner] = table = self._take(shared, num_new)
        return table

    def grow_table(self, owner: str, num_new: int) -> list[int]:
        """Append ``num_new`` fresh blocks to the table; returns them. Raises OutOfBlocks and then takes none."""
        blocks = self._take([], num_new)
        self.tables[owner] += blocks
        return blocks

    def close_table(self, owner: str) -> None:
        """The sequence lets go of all its blocks; those with a hash stay cached until evicted."""
        self._drop(self.tables.pop(owner, []))

    def register(self, block: int, digest: bytes) -> None:
        """Full block ``block`` (referenced, all keys and values written) can be found by ``digest`` from now on."""
        if self.prefix_caching and digest not in self._block_of and self._hash_of[block] is None:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    # ---- migration: destination ------------------------------------------------------------------------------------

    def reserve(
        self, owner: str, num_blocks: int, prefix_hashes: Iterable[bytes] = (), spare: int = 0
    ) -> Reservation | None:
        """Make the reservation of ``owner`` at least ``num_blocks`` long; None (and nothing changed) if that many are not there.

        At the first call leading blocks found in the prefix cache by ``prefix_hashes`` are shared.
        """
        have = self._reservations.get(owner)
        shared: list[int] = []
        if have is None:
            shared = self.match(prefix_hashes)[:num_blocks]
        num_new = max(0, num_blocks - len(shared) - len(have or ()))
        if not self.can_allocate(num_new, shared, spare):
            return None
        blocks = self._take(shared, num_new)
        if have is None:
            self._reservations[owner] = blocks
            self._num_cached[owner] = len(shared)
        else:
            have += blocks
        return self.reservation(owner)

    def reservation(self, owner: str) -> Reservation | None:
        """What ``owner`` has reserved, if anything."""
        blocks = self._reservations.get(owner)
        return None if blocks is None else Reservation(tuple(blocks), self._num_cached[owner])

    def cancel_reservation(self, owner: str) -> bool:
        """Give the reserved blocks back; False if there was no reservation."""
        blocks = self._reservations.pop(owner, None)
        if blocks is None:
            return False
        del self._num_cached[owner]
        self._drop(blocks)
        return True

    def adopt_reservation(self, owner: str, num_blocks: int) -> list[int]:
        """Turn the first ``num_blocks`` reserved blocks into the owner's table; give the rest back."""
        if owner in self.tables:
            raise ValueError(f"request {owner} already has a block table")
        blocks = self._reservations[owner]
        if len(blocks) < num_blocks:
            raise OutOfBlocks(f"request {owner} reserved {len(blocks)} blocks and arrives with {num_blocks}")
        del self._reservations[owner], self._num_cached[owner]
        self._drop(blocks[num_blocks:])
        self.tables[owner] = table = blocks[:num_blocks]
        return table

    @property
    def reserving(self) -> tuple[str, ...]:
        """Requests with a reservation."""
        return tuple(self._reservations)

    # ---- migration: source -----------------------------------------------------------------------------------------

    def hold(self, owner: str) -> int:
        """Keep all blocks now in the owner's table referenced until ``unhold``, whatever becomes of the sequence.

        May be called again after the table grew. Returns the number of blocks held.
        """
        held = self._holds.setdefault(owner, [])
        known = set(held)
        new = [block for block in self.tables.get(owner, ()) if block not in known]
        for block in new:
            self._ref[block] += 1
        held += new
        return len(held)

    def unhold(self, owner: str) -> bool:
        """The peer has read what it needs; False if nothing was held."""
        blocks = self._holds.pop(owner, None)
        self._drop(blocks or [])
        return blocks is not None

    @property
    def holding(self) -> tuple[str, ...]:
        """Requests with a hold."""
        return tuple(self._holds)

    # ---- the books -------------------------------------------------------------------------------------------------

    def audit(self) -> BlockAudit:
        """Recount everything from the owners. O(blocks)."""
        owners = Counter(
            block
            for group in (self.tables, self._reservations, self._holds)
            for blocks in group.values()
            for block in blocks
        )
        free = Counter(self._free)
        wrong: dict[int, str] = {}
        for block in range(self.num_blocks):
            places = free[block] + (block in self._evictable) + (self._ref[block] > 0)
            if self._ref[block] != owners[block]:
                wrong[block] = f"block {block} counts {self._ref[block]} references and has {owners[block]} owners"
            elif places != 1:
                wrong[block] = f"block {block} is in {places} of the states free, cached, referenced"
            digest = self._hash_of[block]
            if digest is not None and self._block_of.get(digest) != block:
                wrong[block] = f"block {block} carries a hash that leads to another block"
            elif digest is None and block in self._evictable:
                wrong[block] = f"block {block} is cached without a hash"
        return BlockAudit(
            total=self.num_blocks,
            free=len(self._free),
            cached=len(self._evictable),
            referenced=sum(1 for count in self._ref if count),
            sequences=len(self.tables),
            reservations=len(self._reservations),
            holds=len(self._holds),
            leaked=len(wrong),
            problems=tuple(wrong.values()),
        )

    def _take(self, shared: list[int], num_new: int) -> list[int]:
        """References to ``shared`` blocks (revived if unreferenced) and to ``num_new`` free or evicted ones."""
        if not self.can_allocate(num_new, shared):
            raise OutOfBlocks(f"{num_new} blocks wanted, {self.num_available} available")
        for block in shared:
            if self._ref[block] == 0:
                del self._evictable[block]
            self._ref[block] += 1
        blocks = list(shared)
        for _ in range(num_new):
            block = self._free.pop() if self._free else self._evict()
            self._ref[block] = 1
            blocks.append(block)
        return blocks

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        digest = self._hash_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._hash_of[block] = None
        return block

    def _drop(self, blocks: list[int]) -> None:
        # Backwards, so that the end of a prefix is evicted before its beginning, without which the end is useless.
        for block in reversed(blocks):
            self._ref[block] -= 1
            if self._ref[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._evictable[block] = None
