"""The ingress's half of the protocol over instances in one process: the client's text equals the undisturbed one through
migrations, deaths and silence, and nothing keeps running that nobody reads."""

from __future__ import annotations

import asyncio

import pytest

from actors.llumnix.engine.request import Request, RequestError, SamplingParams, TokenChunk
from actors.llumnix.frontend import Frontend, FrontendSettings, GenerationFailed, ServiceUnavailable
from tests.actors.llumnix.fake_cluster import FakeInstance, FakeScheduler, expected_text

QUICK = FrontendSettings(silence_s=0.1, sweep_interval_s=0.02, dispatch_timeout_s=0.3)


def request(name="r", max_tokens=20, prompt=(1, 2, 3), **kwargs):
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, seed=7, **kwargs), 0.0)


def run(test, instances=2, step_s=0.001, settings=QUICK):
    """Run ``test(frontend, scheduler)`` on a fresh loop with a running frontend."""

    async def main():
        scheduler = FakeScheduler(*(FakeInstance(f"i{n}", step_s) for n in range(instances)))
        frontend = Frontend(scheduler, lambda handle: handle, settings)
        frontend.start()
        try:
            await asyncio.wait_for(test(frontend, scheduler), 20)
        finally:
            await frontend.stop()
            for instance in scheduler.instances.values():
                instance.die()

    asyncio.run(main())


async def text_of(stream):
    return "".join([delta.text async for delta in stream])


async def until(condition, timeout=5.0):
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.005)


def test_streams_equal_the_models_answer_and_the_scheduler_hears_of_the_end():
    async def test(frontend, scheduler):
        wanted = [request(f"r{i}", 5 + i, (i, 9)) for i in range(6)]
        streams = [(await frontend.submit([r]))[0] for r in wanted]
        assert await asyncio.gather(*map(text_of, streams)) == [expected_text(r) for r in wanted]
        await until(lambda: sorted(scheduler.ended) == [f"r{i}" for i in range(6)])
        assert frontend.num_streams == 0 and not scheduler.aborted

    run(test)


def test_migrations_lose_repeat_and_change_nothing():
    async def test(frontend, scheduler):
        [stream] = await frontend.submit([request(max_tokens=60)])
        moves = 0

        async def mover():
            nonlocal moves
            while True:
                await asyncio.sleep(0.01)
                moves += scheduler.migrate("r")

        task = asyncio.create_task(mover())
        assert await text_of(stream) == expected_text(request(max_tokens=60))
        task.cancel()
        assert moves >= 3 and stream.journal.epoch > 3

    run(test)


def test_a_request_goes_on_from_its_journal_when_its_instance_dies():
    async def test(frontend, scheduler):
        [stream] = await frontend.submit([request(max_tokens=50)])
        text = (await anext(stream)).text
        await until(lambda: len(stream.journal.token_ids) > 10)
        scheduler.instances[stream.instance_id].die()
        text += await text_of(stream)
        assert text == expected_text(request(max_tokens=50))
        assert len(scheduler.dispatched) == 2
        continued = [r for i in scheduler.instances.values() for r in i.added if r.output_token_ids]
        assert len(continued) == 1 and len(continued[0].output_token_ids) > 10

    run(test, step_s=0.003)


def test_a_request_lost_without_a_death_is_found_missing_and_goes_on():
    async def test(frontend, scheduler):
        [stream] = await frontend.submit([request(max_tokens=40)])
        await anext(stream)
        first = stream.journal.token_ids[:1]
        scheduler.instances[stream.instance_id].requests.clear()
        rest = await text_of(stream)
        assert bytes(first).decode() + rest == expected_text(request(max_tokens=40))

    run(test, step_s=0.003)


def test_a_slow_request_is_not_taken_for_lost():
    async def test(frontend, scheduler):
        [stream] = await frontend.submit([request(max_tokens=5)])
        await anext(stream)
        scheduler.instances[stream.instance_id].paused = True
        await asyncio.sleep(4 * QUICK.silence_s)
        scheduler.instances[stream.instance_id].paused = False
        await text_of(stream)
        assert len(scheduler.dispatched) == 1

    run(test)


def test_an_instance_that_keeps_giving_up_ends_in_an_error_not_in_a_loop():
    async def test(frontend, scheduler):
        [stream] = await frontend.submit([request(max_tokens=400)])

        async def killer():
            while True:
                await asyncio.sleep(0.02)
                for instance in list(scheduler.instances.values()):
                    if "r" in instance.requests and not instance.dead:
                        instance.die()
                        scheduler.join(FakeInstance(instance.name + "'", 0.003))

        task = asyncio.create_task(killer())
        with pytest.raises(GenerationFailed, match="in vain"):
            await text_of(stream)
        task.cancel()

    run(test, step_s=0.003)


def test_closing_a_stream_aborts_everywhere_under_the_newest_epoch():
    async def test(frontend, scheduler):
        [stream] = await frontend.submit([request(max_tokens=400)])
        await anext(stream)
        scheduler.migrate("r")
        epoch = scheduler.epoch
        stream.close()
        await until(lambda: all(any(r == "r" and e > epoch for r, e in i.aborts) for i in scheduler.instances.values()))
        assert not any(i.requests for i in scheduler.instances.values())
        assert frontend.num_streams == 0

    run(test)


def test_a_refused_request_leaves_nothing_behind():
    async def test(frontend, scheduler):
        with pytest.raises(RequestError, match="too long") as raised:
            await frontend.submit([request("a"), request("b", max_tokens=4000)])
        assert raised.value.param == "prompt"
        await until(lambda: {"a", "b"} <= set(scheduler.aborted))
        assert not any(i.requests for i in scheduler.instances.values())

    run(test)


def test_without_instances_a_request_waits_and_is_then_refused():
    async def test(frontend, scheduler):
        with pytest.raises(ServiceUnavailable, match="No instance"):
            await frontend.submit([request()])
        late = asyncio.create_task(frontend.submit([request("late", 3)]))
        await asyncio.sleep(0.05)
        scheduler.join(FakeInstance("i9"))
        [stream] = await late
        assert await text_of(stream) == expected_text(request("late", 3))

    run(test, instances=0)


def test_streams_go_on_while_the_scheduler_is_down():
    async def test(frontend, scheduler):
        [stream] = await frontend.submit([request(max_tokens=60)])
        await anext(stream)
        scheduler.down = True
        await text_of(stream)
        assert stream.journal.token_ids and bytes(stream.journal.token_ids).decode() == expected_text(
            request(max_tokens=60)
        )
        scheduler.down = False
        await until(lambda: scheduler.ended == ["r"])

    run(test)


def test_choices_share_the_first_ones_instance_after_its_prefill():
    async def test(frontend, scheduler):
        prompt = tuple(range(40))
        requests = [request(f"r{i}", 4, prompt) for i in range(3)]
        streams = await frontend.submit(requests)
        assert await asyncio.gather(*map(text_of, streams)) == [expected_text(r) for r in requests]
        assert [d.near for d in scheduler.dispatched] == [None, "r0", "r0"]
        assert len({scheduler.places[f"r{i}"] for i in range(3)}) == 1

    run(test)


def test_an_engine_error_reaches_the_reader():
    async def test(frontend, scheduler):
        [stream] = await frontend.submit([request(max_tokens=400)])
        await anext(stream)
        scheduler.instances[stream.instance_id].fail_next = "r"
        with pytest.raises(GenerationFailed, match="broken"):
            await text_of(stream)

    run(test)


def test_lost_tokens_fail_loudly():
    async def test(frontend, scheduler):
        [stream] = await frontend.submit([request(max_tokens=400)])
        await anext(stream)
        instance = scheduler.instances[stream.instance_id]
        instance.emit(TokenChunk("r", stream.journal.epoch, 399, (5,), "x"))
        with pytest.raises(GenerationFailed, match="are missing"):
            await text_of(stream)
        await until(lambda: "r" in scheduler.aborted)

    run(test)
