"""Moving requests between engines over the fake model, at any moment and with any ending: tokens are the definition's, no
block leaks, nobody owns a request twice."""

from __future__ import annotations

import pickle
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.llumnix.engine.engine import Engine, EngineError
from actors.llumnix.engine.request import Request
from tests.actors.llumnix.engine.fakes import (
    Client,
    assert_clean,
    check,
    copy_blocks,
    expected,
    make_engine,
    make_request,
    run,
)
from tests.actors.llumnix.engine.test_engine import request_lists


@dataclass
class Move:
    """A migration as the migrator would drive it, one call at a time."""

    request_id: str
    src: Engine
    dst: Engine
    epoch: int
    preemptions: int
    copied: int = 0
    steps: list[str] = field(default_factory=list)

    @staticmethod
    def begin(request_id: str, src: Engine, dst: Engine, epoch: int) -> Move:
        return Move(request_id, src, dst, epoch, src.status(request_id).num_preemptions)

    def alive(self) -> bool:
        status = self.src.status(self.request_id)
        return status is not None and status.num_preemptions == self.preemptions

    def stage(self) -> bool:
        """Copy the full blocks that grew; False if the migration must be aborted."""
        if not self.alive():
            return False
        self.src.hold(self.request_id)
        ids, _ = self.src.full_blocks(self.request_id, self.copied)
        _, hashes = self.src.full_blocks(self.request_id)
        reservation = self.dst.reserve(self.request_id, self.copied + len(ids), hashes)
        if reservation is None:
            return False
        start = max(self.copied, reservation.num_cached)
        copy_blocks(
            self.src, ids[start - self.copied :], self.dst, reservation.block_ids[start : self.copied + len(ids)]
        )
        self.copied += len(ids)
        return True

    def finish(self, commit: bool = True) -> bool:
        """Last stage: pause, copy the rest, hand over (or resume if ``commit`` is False or there is no room)."""
        if not self.alive():
            return False
        snapshot = pickle.loads(pickle.dumps(self.src.detach(self.request_id)))
        total = self.src.num_blocks(self.request_id)
        if total:
            reservation = self.dst.reserve(self.request_id, total, self.src.full_blocks(self.request_id)[1])
            if reservation is None or not commit:
                self.src.reattach(self.request_id, self.epoch)
                return False
            start = max(self.copied, reservation.num_cached)
            copy_blocks(
                self.src,
                self.src.computed_blocks(self.request_id, start),
                self.dst,
                reservation.block_ids[start:total],
            )
        elif not commit:
            self.src.reattach(self.request_id, self.epoch)
            return False
        try:
            self.dst.attach(snapshot, self.epoch)
        except EngineError:
            self.src.reattach(self.request_id, self.epoch)
            return False
        self.src.release(self.request_id)
        return True

    def clean_up(self) -> None:
        """Both sides give back what they kept; right in every ending."""
        self.src.unhold(self.request_id)
        self.dst.cancel_reservation(self.request_id)


def migrate(request_id: str, src: Engine, dst: Engine, epoch: int, client: Client, steps: int = 1) -> bool:
    move = Move.begin(request_id, src, dst, epoch)
    for _ in range(2):
        if not move.stage():
            break
        for _ in range(steps):
            client.take(src.step().chunks)
    moved = move.finish()
    move.clean_up()
    return moved


@settings(max_examples=80, deadline=None)
@given(
    requests=request_lists(max_requests=6),
    blocks=st.tuples(*[st.integers(8, 24)] * 3),
    seed=st.integers(0, 2**32),
    caching=st.booleans(),
    aborts=st.booleans(),
)
def test_any_interleaving_of_steps_migrations_and_aborts(requests, blocks, seed, caching, aborts):
    rng = random.Random(seed)
    engines = [
        make_engine(b, name=f"e{i}", max_batched_tokens=24, max_num_seqs=3, prefix_caching=caching)
        for i, b in enumerate(blocks)
    ]
    client, epoch, moves, aborted = Client(), 1, [], set()
    todo = list(requests)
    for _ in range(400):
        action = rng.choice(["add", "step", "step", "step", "step", "begin", "stage", "finish", "drop", "abort"])
        if action == "add" and todo:
            rng.choice(engines).add_request(todo.pop(0))
        elif action == "step":
            client.take(rng.choice(engines).step().chunks)
        elif action == "begin":
            src, dst = rng.sample(engines, 2)
            free = [r for r in src.requests() if r not in {m.request_id for m in moves}]
            if free:
                epoch += 1
                moves.append(Move.begin(rng.choice(free), src, dst, epoch))
        elif action == "stage" and moves:
            move = rng.choice(moves)
            if not move.stage():
                move.clean_up()
                moves.remove(move)
        elif action in ("finish", "drop") and moves:
            move = moves.pop(rng.randrange(len(moves)))
            move.finish(commit=action == "finish")
            move.clean_up()
        elif action == "abort" and aborts and rng.random() < 0.2:
            victim = rng.choice(requests).request_id
            if victim not in {r.request_id for r in todo} and not client.finished(victim):
                ended = [engine.abort(victim) for engine in engines]
                assert sum(ended) <= 1, "two engines owned it"
                aborted.add(victim)
        for engine in engines:
            audit = engine.audit()
            assert audit.leaked == 0, audit.problems
            assert len(engine.scheduler.running) + engine.scheduler.slots_taken <= 3 + len(engine._detached)
        owners = [r for engine in engines for r in engine.requests()]
        assert len(owners) == len(set(owners)), "two engines own a request"
    for move in moves:
        move.clean_up()
    for request in todo:
        engines[0].add_request(request)
    for engine in engines:
        run(engine, client)
    for request in requests:
        if request.request_id not in aborted:
            check(request, client)
    assert_clean(*engines)


def sampled(name: str = "r", prompt=range(1, 40), **extra) -> Request:
    return make_request(
        name,
        prompt,
        **(
            {
                "temperature": 1.2,
                "top_k": 40,
                "seed": 11,
                "repetition_penalty": 1.2,
                "frequency_penalty": 0.4,
                "max_tokens": 90,
                "ignore_eos": True,
                "logprobs": 0,
                "stop": ("bcabcabc", "日日日"),
            }
            | extra
        ),
    )


@pytest.mark.parametrize("at", [1, 2, 3, 7, 20, 50])
def test_many_hops(at):
    engines = [make_engine(40, name=f"e{i}") for i in range(3)]
    client, request = Client(), sampled()
    engines[0].add_request(request)
    here, hops = 0, 0
    for step in range(1, 400):
        if not any(engine.has_work() for engine in engines):
            break
        client.take(engines[here].step().chunks)
        if step % at == 0 and engines[here].status("r"):
            there = (here + 1) % 3
            if migrate("r", engines[here], engines[there], hops + 1, client):
                here, hops = there, hops + 1
    check(request, client)
    assert hops >= 1
    assert client.chunks["r"][-1].epoch <= hops
    assert_clean(*engines)


def test_migration_while_still_prefilling_carries_what_is_computed():
    src, dst = make_engine(40, max_batched_tokens=16), make_engine(40, max_batched_tokens=16)
    request, client = make_request("r", range(1, 61), ignore_eos=True), Client()
    src.add_request(request)
    src.step()
    src.step()
    assert src.status("r").num_computed_tokens == 32
    assert migrate("r", src, dst, 1, client, steps=0)
    run(dst, client)
    assert dst.model.tokens_run == 60 - 32 + 23
    check(request, client)
    assert_clean(src, dst)


def test_a_waiting_request_is_queued_at_the_destination():
    src, dst = make_engine(max_num_seqs=1), make_engine(max_num_seqs=1)
    first, second = make_request("a", range(1, 30)), make_request("b", range(1, 30), arrival=1.0)
    client = Client()
    src.add_request(first)
    src.add_request(second)
    src_chunks = src.step().chunks
    client.take(src_chunks)
    snapshot = src.detach("b")
    assert snapshot.num_computed_tokens == 0 and snapshot.block_hashes == ()
    dst.attach(snapshot, 1)
    src.release("b")
    assert dst.status("b").state == "waiting"
    run(src, client)
    run(dst, client)
    check(first, client)
    check(second, client)
    assert_clean(src, dst)


def test_a_preempted_request_that_waits_again_is_queued_with_its_output():
    src, dst = make_engine(8, max_num_seqs=2), make_engine(40)
    client = Client()
    requests = [
        make_request(f"r{i}", range(i + 1, 40 + i), arrival=float(i), max_tokens=60, ignore_eos=True) for i in (0, 1)
    ]
    for request in requests:
        src.add_request(request)
    while not src.scheduler.num_preemptions:
        client.take(src.step().chunks)
    assert src.status("r1").state == "waiting" and src.status("r1").num_blocks == 0
    snapshot = src.detach("r1")
    assert snapshot.num_computed_tokens == 0 and len(snapshot.output_token_ids) > 5
    dst.attach(snapshot, 1)
    src.release("r1")
    run(src, client)
    run(dst, client)
    for request in requests:
        check(request, client)
    assert client.chunks["r1"][-1].num_preemptions == 1
    assert_clean(src, dst)


def test_what_the_client_was_told_of_the_cache_travels():
    src, dst = make_engine(40), make_engine(40)
    client = Client()
    for name, tokens in (("warm", 1), ("r", 20)):
        src.add_request(make_request(name, range(1, 40), max_tokens=tokens, ignore_eos=True))
        client.take(src.step().chunks)
    assert migrate("r", src, dst, 1, client)
    run(dst, client)
    assert {chunk.cached_tokens for chunk in client.chunks["r"]} == {32}
    assert_clean(src, dst)


def test_attached_keeps_its_place_in_the_order():
    src, dst = make_engine(60), make_engine(60)
    for name, priority, arrival in (("old", 0, 0.0), ("new", 0, 9.0)):
        dst.add_request(make_request(name, [3, 4], arrival=arrival, priority=priority, ignore_eos=True))
    src.add_request(make_request("urgent", [5, 6], priority=2, arrival=5.0, ignore_eos=True))
    src.add_request(make_request("middle", [7, 8], arrival=5.0, ignore_eos=True))
    client = Client()
    src.step(), dst.step()
    assert migrate("urgent", src, dst, 1, client) and migrate("middle", src, dst, 2, client)
    assert [seq.request_id for seq in dst.scheduler.running] == ["urgent", "old", "middle", "new"]
    assert dst.scheduler.running[0].num_migrations == 1


def test_blocks_cached_at_the_destination_need_no_copy():
    src, dst = make_engine(40, name="src"), make_engine(40, name="dst")
    client = Client()
    dst.add_request(make_request("before", range(1, 50), max_tokens=1))
    run(dst, client)
    request = make_request("r", range(1, 50), ignore_eos=True, max_tokens=40)
    src.add_request(request)
    client.take(src.step().chunks)
    client.take(src.step().chunks)
    ids, hashes = src.full_blocks("r")
    reservation = dst.reserve("r", len(ids), hashes)
    assert reservation.num_cached == 3 == len(ids)
    dst.cancel_reservation("r")
    other = make_engine(40)
    assert other.reserve("r", 3, hashes).num_cached == 0
    assert migrate("r", src, dst, 1, client)
    assert dst.load().running[0].request_id == "r"
    again = make_request("again", [*range(1, 50), *expected(request).token_ids[:20]], max_tokens=2)
    run(dst, client)
    dst.add_request(again)
    run(dst, client)
    assert client.chunks["again"][0].cached_tokens >= 64, "what came by migration is in the prefix cache"
    check(request, client)
    check(again, client)
    assert_clean(src, dst)


def test_a_hold_outlives_the_request():
    engine, client = make_engine(20), Client()
    engine.add_request(make_request("r", range(1, 40), max_tokens=5, ignore_eos=True))
    client.take(engine.step().chunks)
    held = engine.hold("r")
    ids, _ = engine.full_blocks("r")
    run(engine, client)
    before = engine.kv[list(ids)].clone()
    assert engine.status("r") is None and engine.audit().holds == 1 and engine.audit().referenced == held
    for i in range(10):
        engine.add_request(make_request(f"x{i}", [i + 1] * 150, max_tokens=5, ignore_eos=True))
    run(engine, client)
    assert (engine.kv[list(ids)] == before).all()
    assert engine.unhold("r") and not engine.unhold("r")
    assert_clean(engine)


def test_preempted_between_stages_is_seen():
    src, dst = make_engine(9, max_num_seqs=2), make_engine(40)
    client = Client()
    src.add_request(make_request("first", range(1, 40), max_tokens=90, ignore_eos=True))
    src.add_request(make_request("second", range(2, 41), arrival=1.0, max_tokens=60, ignore_eos=True))
    client.take(src.step().chunks)
    client.take(src.step().chunks)
    client.take(src.step().chunks)
    move = Move.begin("second", src, dst, 1)
    assert move.stage()
    while move.alive():
        client.take(src.step().chunks)
    assert not move.stage() and not move.finish()
    move.clean_up()
    run(src, client)
    check(make_request("second", range(2, 41), max_tokens=60, ignore_eos=True), client)
    assert_clean(src, dst)


def test_no_room_no_reservation():
    engine = make_engine(10, max_num_seqs=2, watermark=0.2)
    assert engine.reserve("a", 9) is None, "beyond the watermark"
    assert len(engine.reserve("a", 6).block_ids) == 6
    assert len(engine.reserve("a", 4).block_ids) == 6, "never shrinks"
    assert engine.reserve("a", 11) is None and len(engine.reserve("a", 10).block_ids) == 10
    assert engine.reserve("b", 1) is None
    assert engine.cancel_reservation("a") and not engine.cancel_reservation("a")
    assert engine.reserve("a", 1) and engine.reserve("b", 1)
    assert engine.reserve("c", 1) is None, "both places of the batch are promised"
    assert engine.load().reserved_blocks == 2 and set(engine.load().migrating) == {"a", "b"}
    engine.cancel_reservation("a")
    engine.draining = True
    assert engine.reserve("c", 1) is None and engine.load().draining
    engine.cancel_reservation("b")
    assert_clean(engine)


def test_a_reservation_keeps_its_place_in_the_batch():
    src, dst = make_engine(40), make_engine(40, max_num_seqs=2)
    client = Client()
    src.add_request(make_request("r", range(1, 20), ignore_eos=True))
    client.take(src.step().chunks)
    move = Move.begin("r", src, dst, 1)
    assert move.stage()
    for i in range(3):
        dst.add_request(make_request(f"x{i}", [i + 1], arrival=float(i), ignore_eos=True))
    output = dst.step()
    client.take(output.chunks)
    assert output.num_sequences == 1
    assert move.finish()
    move.clean_up()
    output = dst.step()
    client.take(output.chunks)
    assert output.num_sequences == 2
    run(dst, client)
    assert_clean(src, dst)


def test_abort_in_the_last_stage():
    src, dst = make_engine(40), make_engine(40)
    for ending in ("reattach", "release"):
        src.add_request(make_request(ending, range(1, 20)))
        src.step()
        src.detach(ending)
        assert src.abort(ending)
        if ending == "reattach":
            assert not src.reattach(ending, 5)
        else:
            src.release(ending)
        assert src.status(ending) is None
    assert_clean(src)
    src.add_request(make_request("r", range(1, 20)))
    src.step()
    snapshot = src.detach("r")
    dst.reserve("r", 2)
    dst.abort("r")
    with pytest.raises(EngineError, match="aborted before"):
        dst.attach(snapshot, 9)
    dst.cancel_reservation("r")
    src.release("r")
    assert_clean(src, dst)


def test_an_order_of_an_older_epoch_is_refused_but_not_a_newer_one():
    src, dst = make_engine(40), make_engine(40)
    request, client = make_request("r", range(1, 20)), Client()
    src.add_request(request)
    client.take(src.step().chunks)
    snapshot = src.detach("r")
    assert not dst.abort("r", up_to_epoch=3)
    dst.reserve("r", 2)
    with pytest.raises(EngineError):
        dst.attach(snapshot, 3)
    copy_blocks(src, src.computed_blocks("r"), dst, dst.reserve("r", 2).block_ids)
    dst.attach(snapshot, 4)
    src.release("r")
    run(dst, client)
    check(request, client)
    assert_clean(src, dst)


def test_hooks_say_what_is_wrong():
    engine = make_engine(10)
    for call in (
        engine.full_blocks,
        engine.num_blocks,
        engine.hold,
        engine.detach,
        engine.release,
        engine.computed_blocks,
    ):
        with pytest.raises(EngineError, match="nobody is not here"):
            call("nobody")
    engine.add_request(make_request("r", range(1, 40)))
    engine.step()
    with pytest.raises(EngineError, match="running, not detached"):
        engine.release("r")
    with pytest.raises(EngineError, match="not detached"):
        engine.reattach("r", 1)
    snapshot = engine.detach("r")
    with pytest.raises(EngineError, match="already detached"):
        engine.detach("r")
    with pytest.raises(EngineError, match="already here"):
        engine.attach(snapshot, 1)
    other = make_engine(10)
    with pytest.raises(EngineError, match="has 0 reserved"):
        other.attach(snapshot, 1)
    small = make_engine(3)
    small.reserve("r", 3)
    with pytest.raises(EngineError, match="more than this instance"):
        small.attach(snapshot, 1)
    assert engine.migration_candidates() == ()
