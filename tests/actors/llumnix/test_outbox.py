"""The outbox against a list: whatever is lost, repeated or taken back, an ingress sees every chunk once and in order."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.llumnix.engine.request import TokenChunk
from actors.llumnix.outbox import Outbox, OutboxError


def chunk(index: int, request_id: str = "r", ingress_id: str = "i") -> TokenChunk:
    return TokenChunk(request_id, 1, index, (index,), "x", ingress_id)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.tuples(st.sampled_from(["put", "poll", "lost answer", "take"]), st.integers(0, 2)), max_size=60))
def test_every_chunk_once_and_in_order(actions):
    outbox = Outbox()
    made: dict[str, list[int]] = {f"r{i}": [] for i in range(3)}
    got: dict[str, list[int]] = {f"r{i}": [] for i in range(3)}
    ack, last = 0, None

    def poll(answer_lost: bool) -> None:
        nonlocal ack, last
        number, chunks = outbox.collect("i", ack, 0.0)
        if number > ack:
            if last is not None and last[0] == number:
                assert [c for c in last[1] if c in chunks] == chunks, "a repeated poll brought something else"
            last = (number, chunks)
        else:
            assert not chunks
        if not answer_lost:
            ack = number
            for c in chunks:
                got[c.request_id].append(c.index)

    for action, which in actions:
        name = f"r{which}"
        if action == "put":
            index = len(made[name])
            outbox.put([chunk(index, name)])
            made[name].append(index)
        elif action == "take":
            taken = outbox.take_unacked(name)
            indices = [c.index for c in taken]
            assert indices == sorted(indices)
            # What the ingress has accepted but not yet acknowledged may be in it: it is skipped there by its index.
            got[name] += [i for i in indices if i not in got[name]]
        else:
            poll(action == "lost answer")
    for _ in range(3):  # a repeated answer, what was queued meanwhile, and its acknowledgement
        poll(False)
    assert got == made
    assert len(outbox) == 0


def test_a_poll_with_the_old_ack_gets_the_same_batch():
    outbox = Outbox()
    outbox.put([chunk(0), chunk(1)])
    assert outbox.collect("i", 0, 0) == (1, [chunk(0), chunk(1)])
    outbox.put([chunk(2)])
    assert outbox.collect("i", 0, 0) == (1, [chunk(0), chunk(1)])
    assert outbox.collect("i", 1, 0) == (2, [chunk(2)])
    assert outbox.collect("i", 2, 0) == (2, [])


def test_ingresses_do_not_see_each_other():
    outbox = Outbox()
    outbox.put([chunk(0, ingress_id="a"), chunk(0, "s", ingress_id="b")])
    assert [c.request_id for c in outbox.collect("b", 0, 0)[1]] == ["s"]
    assert [c.request_id for c in outbox.collect("a", 0, 0)[1]] == ["r"]


def test_take_unacked_takes_in_flight_and_queued_and_leaves_the_others():
    outbox = Outbox()
    outbox.put([chunk(0), chunk(0, "s")])
    outbox.collect("i", 0, 0)
    outbox.put([chunk(1), chunk(1, "s")])
    assert [c.index for c in outbox.take_unacked("r")] == [0, 1]
    assert outbox.take_unacked("r") == ()
    assert outbox.collect("i", 0, 0) == (1, [chunk(0, "s")])
    assert outbox.collect("i", 1, 0) == (2, [chunk(1, "s")])


def test_wrong_acknowledgement_is_an_error():
    outbox = Outbox()
    with pytest.raises(OutboxError, match="restarted"):
        outbox.collect("i", 3, 0)
    with pytest.raises(OutboxError):
        outbox.collect("i", -1, 0)


def test_idle_ingress_is_reported_and_dropped():
    clock = Clock()
    outbox = Outbox(clock=clock)
    outbox.put([chunk(0, ingress_id="dead"), chunk(0, ingress_id="alive")])
    clock.now = 20.0
    outbox.collect("alive", 0, 0)
    assert outbox.idle_ingresses(10.0) == ("dead",)
    assert outbox.drop("dead") == 1 and outbox.drop("dead") == 0
    assert outbox.idle_ingresses(10.0) == () and len(outbox) == 1


def test_memory_is_bounded():
    outbox = Outbox(max_chunks=10)
    outbox.put(chunk(i) for i in range(100))
    assert len(outbox) == 0 and outbox.idle_ingresses(1e9) == ("i",)
    with pytest.raises(OutboxError, match="keep up"):
        outbox.collect("i", 0, 0)
    outbox.drop("i")
    assert outbox.collect("i", 0, 0) == (0, [])


def test_blocking_poll_wakes_and_times_out():
    outbox = Outbox()
    answers = []
    poller = threading.Thread(target=lambda: answers.append(outbox.collect("i", 0, 20.0)))
    poller.start()
    time.sleep(0.05)
    assert outbox.idle_ingresses(0.0) == (), "it polls at this moment"
    outbox.put([chunk(0)])
    poller.join(10)
    assert answers == [(1, [chunk(0)])]
    assert outbox.collect("i", 1, 0.01) == (1, [])


def test_async_poll_wakes_from_another_thread_and_times_out():
    outbox = Outbox()

    async def main():
        threading.Timer(0.05, lambda: outbox.put([chunk(0)])).start()
        first = await outbox.acollect("i", 0, 20.0)
        return first, await outbox.acollect("i", 1, 0.01)

    assert asyncio.run(main()) == ((1, [chunk(0)]), (1, []))


def test_cancelled_and_orphaned_async_polls_leave_nothing_behind():
    outbox = Outbox()

    async def cancelled():
        task = asyncio.ensure_future(outbox.acollect("i", 0, 20.0))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    queue = outbox._queues["i"]
    assert queue.polls == 0 and queue.wakers == []
    outbox.put([chunk(0)])
    assert outbox.collect("i", 0, 0)[1] == [chunk(0)]


def test_two_async_polls_of_one_ingress_get_the_same_batch():
    outbox = Outbox()

    async def main():
        polls = [asyncio.ensure_future(outbox.acollect("i", 0, 5.0)) for _ in range(2)]
        await asyncio.sleep(0.02)
        outbox.put([chunk(0)])
        return await asyncio.gather(*polls)

    assert asyncio.run(main()) == [(1, [chunk(0)])] * 2


def test_many_threads_lose_nothing():
    outbox = Outbox()
    total = 2000

    def produce(name: str) -> None:
        for i in range(total):
            outbox.put([chunk(i, name)])

    producers = [threading.Thread(target=produce, args=(f"r{n}",)) for n in range(3)]
    for producer in producers:
        producer.start()
    got: dict[str, list[int]] = {}
    ack, rng = 0, random.Random(0)
    deadline = time.monotonic() + 30
    while sum(map(len, got.values())) < 3 * total and time.monotonic() < deadline:
        number, chunks = outbox.collect("i", ack, 0.5)
        if rng.random() < 0.3:
            continue  # the answer was lost
        if number > ack:
            for c in chunks:
                got.setdefault(c.request_id, []).append(c.index)
        ack = number
    assert got == {f"r{n}": list(range(total)) for n in range(3)}
