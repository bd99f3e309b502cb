"""The block manager against a brute-force model of who owns what: no interleaving leaks a block or frees one twice."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from actors.llumnix.engine.block_manager import BlockManager, OutOfBlocks, block_hash, root_hash

SIZE = 4


def hashes_of(tokens: list[int]) -> list[bytes]:
    chain = [root_hash("m")]
    for i in range(len(tokens) // SIZE):
        chain.append(block_hash(chain[-1], array("q", tokens[i * SIZE : (i + 1) * SIZE])))
    return chain[1:]


class Interleavings(RuleBasedStateMachine):
    """Every operation in any order. The model knows per owner the list of blocks, and per block the content last registered."""

    owners = Bundle("owners")

    def __init__(self):
        super().__init__()
        self.total = 10
        self.blocks = BlockManager(self.total, SIZE)
        self.tables: dict[str, list[int]] = {}
        self.reserved: dict[str, list[int]] = {}
        self.held: dict[str, list[int]] = {}
        self.content: dict[int, bytes] = {}
        self.count = 0

    def _owned(self) -> set[int]:
        return {b for group in (self.tables, self.reserved, self.held) for blocks in group.values() for b in blocks}

    def _claim_fresh(self, fresh: list[int]) -> None:
        """Fresh blocks must be nobody's, and their old content is gone."""
        assert len(set(fresh)) == len(fresh)
        assert not set(fresh) & self._owned(), "a block was given to a second owner"
        for block in fresh:
            self.content.pop(block, None)

    def _check_shared(self, shared: list[int], hashes: list[bytes]) -> None:
        for block, digest in zip(shared, hashes, strict=False):
            assert self.content.get(block) == digest, "a shared block has other content"

    @rule(target=owners)
    def new_owner(self):
        self.count += 1
        return f"r{self.count}"

    @rule(owner=owners, tokens=st.lists(st.integers(0, 1), max_size=20), extra=st.integers(0, 4))
    def open_table(self, owner, tokens, extra):
        if owner in self.tables:
            return
        hashes = hashes_of(tokens)
        shared = self.blocks.match(hashes)
        self._check_shared(shared, hashes)
        free_for_new = self.total - len(self._owned() | set(shared))
        assert self.blocks.can_allocate(extra, shared) == (extra <= free_for_new)
        if extra > free_for_new:
            with pytest.raises(OutOfBlocks):
                self.blocks.open_table(owner, shared, extra)
            return
        table = list(self.blocks.open_table(owner, shared, extra))
        assert table[: len(shared)] == shared
        owned_shared = set(shared)
        assert not owned_shared & set(table[len(shared) :])
        self._claim_fresh(table[len(shared) :])
        self.tables[owner] = table

    @rule(owner=owners, num=st.integers(1, 3))
    def grow(self, owner, num):
        if owner not in self.tables:
            return
        room = self.total - len(self._owned())
        if num > room:
            with pytest.raises(OutOfBlocks):
                self.blocks.grow_table(owner, num)
        else:
            fresh = list(self.blocks.grow_table(owner, num))
            self._claim_fresh(fresh)
            self.tables[owner] += fresh

    @rule(owner=owners, tokens=st.lists(st.integers(0, 1), min_size=4, max_size=20))
    def register(self, owner, tokens):
        for block, digest in zip(self.tables.get(owner, []), hashes_of(tokens), strict=False):
            known = digest in self.content.values()
            self.blocks.register(block, digest)
            if not known and block not in self.content:
                self.content[block] = digest

    @rule(owner=owners)
    def close(self, owner):
        self.blocks.close_table(owner)
        self.tables.pop(owner, None)

    @rule(owner=owners, num=st.integers(0, 6), tokens=st.lists(st.integers(0, 1), max_size=20))
    def reserve(self, owner, num, tokens):
        hashes = hashes_of(tokens)
        have = self.reserved.get(owner)
        expect_shared = self.blocks.match(hashes)[:num] if have is None else []
        fresh_wanted = max(0, num - len(expect_shared) - len(have or []))
        room = self.total - len(self._owned() | set(expect_shared))
        reservation = self.blocks.reserve(owner, num, hashes)
        assert (reservation is None) == (fresh_wanted > room)
        if reservation is None:
            return
        ids = list(reservation.block_ids)
        assert len(ids) == max(num, len(have or []))
        if have is None:
            assert reservation.num_cached == len(expect_shared)
            self._check_shared(ids[: len(expect_shared)], hashes)
            self._claim_fresh(ids[len(expect_shared) :])
        else:
            assert ids[: len(have)] == have
            self._claim_fresh(ids[len(have) :])
        self.reserved[owner] = ids

    @rule(owner=owners)
    def cancel(self, owner):
        assert self.blocks.cancel_reservation(owner) == (owner in self.reserved)
        self.reserved.pop(owner, None)

    @rule(owner=owners, num=st.integers(0, 6))
    def adopt(self, owner, num):
        have = self.reserved.get(owner)
        if have is None or owner in self.tables:
            return
        if num > len(have):
            with pytest.raises(OutOfBlocks):
                self.blocks.adopt_reservation(owner, num)
            return
        assert self.blocks.adopt_reservation(owner, num) == have[:num]
        del self.reserved[owner]
        self.tables[owner] = have[:num]

    @rule(owner=owners)
    def hold(self, owner):
        held = self.held.setdefault(owner, [])
        held += [b for b in self.tables.get(owner, []) if b not in held]
        assert self.blocks.hold(owner) == len(held)

    @rule(owner=owners)
    def unhold(self, owner):
        assert self.blocks.unhold(owner) == (owner in self.held)
        self.held.pop(owner, None)

    @invariant()
    def books_are_right(self):
        audit = self.blocks.audit()
        assert audit.leaked == 0, audit.problems
        owned = self._owned()
        assert audit.referenced == len(owned)
        assert audit.free + audit.cached == self.total - len(owned) == self.blocks.num_available
        assert audit.total == self.total
        assert self.blocks.num_reserved == sum(map(len, self.reserved.values()))
        assert {k: list(v) for k, v in self.blocks.tables.items()} == self.tables

    def teardown(self):
        for owner in [*self.tables, *self.reserved, *self.held]:
            self.blocks.close_table(owner)
            self.blocks.cancel_reservation(owner)
            self.blocks.unhold(owner)
        audit = self.blocks.audit()
        assert (audit.leaked, audit.referenced, audit.free + audit.cached) == (0, 0, self.total)


Interleavings.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestInterleavings = Interleavings.TestCase


def test_least_recently_used_prefix_is_evicted_from_its_end():
    blocks = BlockManager(6, SIZE)
    old, new = hashes_of([1] * 12), hashes_of([2] * 12)
    for name, hashes in (("old", old), ("new", new)):
        for block, digest in zip(blocks.open_table(name, [], 3), hashes, strict=True):
            blocks.register(block, digest)
    blocks.close_table("old")
    blocks.close_table("new")
    blocks.open_table("x", [], 2)
    assert len(blocks.match(old)) == 1 and len(blocks.match(new)) == 3
    blocks.open_table("y", [], 2)
    assert len(blocks.match(old)) == 0 and len(blocks.match(new)) == 2


def test_the_hash_covers_all_before_it_and_the_numerics():
    assert hashes_of([1, 2, 3, 4, 5, 6, 7, 8])[1] != hashes_of([1, 2, 3, 5, 5, 6, 7, 8])[1]
    assert hashes_of([1, 2, 3, 4])[0] == hashes_of([1, 2, 3, 4, 9])[0]
    tokens = array("q", [1, 2, 3, 4])
    assert block_hash(root_hash("fp32"), tokens) != block_hash(root_hash("int8"), tokens)


def test_no_prefix_caching_means_nothing_is_kept():
    blocks = BlockManager(4, SIZE, prefix_caching=False)
    digest = hashes_of([1] * 4)
    blocks.register(blocks.open_table("a", [], 1)[0], digest[0])
    blocks.close_table("a")
    assert blocks.match(digest) == [] and blocks.audit().free == 4


@pytest.mark.parametrize("damage", ["double free", "lost", "extra reference", "stray hash"])
def test_the_audit_sees_damage(damage):
    blocks = BlockManager(4, SIZE)
    block = blocks.open_table("a", [], 1)[0]
    assert blocks.audit().leaked == 0
    if damage == "double free":
        blocks._free.append(block)
    elif damage == "lost":
        blocks._free.pop()
    elif damage == "extra reference":
        blocks._ref[block] += 1
    else:
        blocks._hash_of[block] = b"x"
    assert blocks.audit().leaked > 0


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="kv_memory_mib"):
        BlockManager(0, SIZE)
