"""The engine over the fake model: whatever the batch, the chunks, the cache or the memory do, the tokens are the definition's."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.llumnix.engine.request import RequestError, TokenChunk
from tests.actors.llumnix.engine.fakes import (
    EOS,
    VOCAB,
    Client,
    assert_clean,
    check,
    expected,
    make_engine,
    make_request,
    run,
)

samplings = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "top_k": st.sampled_from([0, 3, 20]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.8]),
        "frequency_penalty": st.sampled_from([0.0, -0.5, 0.5]),
        "seed": st.integers(-5, 2**40),
        "max_tokens": st.integers(1, 40),
        "stop": st.lists(st.sampled_from(["ab", "bca", "é", "日", "abcab", "a ", "�", "\n"]), max_size=3).map(tuple),
        "include_stop_str_in_output": st.booleans(),
        "stop_token_ids": st.lists(st.integers(1, VOCAB - 1), max_size=2).map(tuple),
        "ignore_eos": st.booleans(),
        "logprobs": st.sampled_from([None, 0]),
    },
)


@st.composite
def request_lists(draw, max_requests: int = 8, max_prompt: int = 70):
    """Requests of which some share a prefix, so that the prefix cache has something to find."""
    stem = draw(st.lists(st.integers(1, VOCAB - 1), min_size=48, max_size=48))
    requests = []
    for i in range(draw(st.integers(1, max_requests))):
        shared = draw(st.sampled_from([0, 0, 16, 33, 48]))
        own = draw(st.integers(1, max_prompt - shared))
        tail = random.Random(draw(st.integers(0, 2**16))).choices(range(1, VOCAB), k=own)
        sampling = draw(samplings)
        if draw(st.booleans()):
            sampling["min_tokens"] = draw(st.integers(0, sampling.get("max_tokens", 24)))
        requests.append(
            make_request(f"r{i}", stem[:shared] + tail, priority=draw(st.integers(0, 1)), arrival=float(i), **sampling)
        )
    return requests


@settings(max_examples=60, deadline=None)
@given(
    requests=request_lists(),
    blocks=st.integers(8, 40),
    tokens=st.integers(2, 64),
    seqs=st.integers(1, 8),
    caching=st.booleans(),
    watermark=st.sampled_from([0.0, 0.2]),
    gaps=st.lists(st.integers(0, 6), min_size=8, max_size=8),
)
def test_any_batch_any_chunks_any_memory_give_the_definition(requests, blocks, tokens, seqs, caching, watermark, gaps):
    engine = make_engine(
        blocks, max_batched_tokens=tokens, max_num_seqs=seqs, prefix_caching=caching, watermark=watermark
    )
    client = Client()
    for request, gap in zip(requests, gaps, strict=False):
        engine.add_request(request)
        for _ in range(gap):
            output = engine.step()
            assert output.num_tokens <= tokens and output.num_sequences <= seqs
            client.take(output.chunks)
            assert engine.audit().leaked == 0, engine.audit().problems
    run(engine, client)
    for request in requests:
        check(request, client)
    assert_clean(engine)


def test_preemption_happens_and_changes_nothing():
    engine = make_engine(blocks=10, max_num_seqs=4)
    requests = [
        make_request(f"r{i}", range(1, 30), arrival=i, max_tokens=60, ignore_eos=True, temperature=1.0, seed=i)
        for i in range(4)
    ]
    client = Client()
    for request in requests:
        engine.add_request(request)
    run(engine, client)
    assert engine.scheduler.num_preemptions > 0
    assert client.chunks["r0"][-1].num_preemptions == 0, "the first in order is never a victim"
    assert max(c[-1].num_preemptions for c in client.chunks.values()) > 0
    for request in requests:
        check(request, client)
    assert_clean(engine)


def test_the_victim_is_the_least_urgent_then_the_latest():
    engine = make_engine(blocks=9, max_num_seqs=3)
    for name, priority, arrival in (("late", 0, 2.0), ("urgent", 1, 3.0), ("early", 0, 1.0)):
        engine.add_request(
            make_request(name, range(1, 40), priority=priority, arrival=arrival, max_tokens=40, ignore_eos=True)
        )
    client = Client()
    run(engine, client)
    preemptions = {name: chunks[-1].num_preemptions for name, chunks in client.chunks.items()}
    assert preemptions["urgent"] == 0 and preemptions["late"] > 0
    order = sorted(client.chunks, key=lambda name: client.chunks[name][-1].time)
    assert order == ["urgent", "early", "late"]


def test_a_prompt_that_was_seen_is_not_computed_again():
    engine, client = make_engine(), Client()
    engine.add_request(make_request("a", range(1, 51), max_tokens=1))
    run(engine, client)
    before = engine.model.tokens_run
    engine.add_request(make_request("b", range(1, 51), max_tokens=1))
    run(engine, client)
    assert engine.model.tokens_run - before == 2
    assert client.chunks["b"][0].cached_tokens == 48 and client.chunks["a"][0].cached_tokens == 0


def test_a_prompt_of_whole_blocks_that_is_all_cached_still_gets_its_logits():
    for at_once in (True, False):
        engine, client = make_engine(), Client()
        requests = [make_request(name, range(1, 49), seed=i, temperature=1.0) for i, name in enumerate("ab")]
        for request in requests:
            engine.add_request(request)
            if not at_once:
                run(engine, client)
        run(engine, client)
        for request in requests:
            check(request, client)
        assert client.chunks["b"][0].cached_tokens == 32
        assert_clean(engine)


def test_requests_of_one_prompt_share_its_blocks_though_they_come_at_once():
    engine, client = make_engine(max_batched_tokens=256), Client()
    requests = [make_request(f"n{i}", range(1, 52), seed=i, temperature=1.0, ignore_eos=True) for i in range(4)]
    for request in requests:
        engine.add_request(request)
    client.take(engine.step().chunks)
    client.take(engine.step().chunks)
    assert engine.audit().referenced == 3 + 4, "three full blocks shared, one own block each"
    run(engine, client)
    for request in requests:
        check(request, client)
    assert engine.model.tokens_run == 51 + 3 * 3 + 4 * 23
    assert_clean(engine)


def test_a_long_prompt_does_not_stop_the_others():
    engine, client = make_engine(max_batched_tokens=16), Client()
    engine.add_request(make_request("short", [1, 2, 3], max_tokens=30, ignore_eos=True))
    client.take(engine.step().chunks)
    engine.add_request(make_request("long", [5] * 200, arrival=1.0))
    for _ in range(10):
        output = engine.step()
        assert [c.request_id for c in output.chunks] == ["short"] and output.num_tokens == 16
        client.take(output.chunks)


def test_continuation_from_a_journal_is_exact():
    request = make_request(
        "r", range(1, 40), temperature=1.0, seed=3, max_tokens=50, stop=("bca", "xyz"), frequency_penalty=0.3
    )
    want = expected(request)
    for cut in range(len(want.token_ids) + 1):
        engine, client = make_engine(), Client()
        engine.add_request(replace(request, output_token_ids=tuple(want.token_ids[:cut]), epoch=2))
        run(engine, client)
        chunks = client.chunks["r"]
        assert chunks[0].index == cut
        got = client.result("r")
        assert got.token_ids == want.token_ids[cut:] and got.finish_reason == want.finish_reason
        assert want.text.endswith(got.text) and got.stop_reason == want.stop_reason
        assert_clean(engine)


def test_abort_frees_everything_and_says_so_once():
    engine, client = make_engine(), Client()
    for i in range(3):
        engine.add_request(make_request(f"r{i}", range(1, 30), ignore_eos=True))
    engine.step()
    assert engine.abort("r0") and not engine.abort("nobody")
    assert [(c.request_id, c.finish_reason) for c in engine.take_chunks()] == [("r0", "abort")]
    assert engine.abort("r1") and engine.abort("r2")
    assert not engine.abort("r2")
    run(engine, client)
    assert_clean(engine)


def test_abort_of_an_ingress_spares_the_others():
    engine, client = make_engine(), Client()
    stays = replace(make_request("stays", range(1, 30)), ingress_id="other")
    engine.add_request(stays)
    for i in range(3):
        engine.add_request(make_request(f"r{i}", range(1, 30), ignore_eos=True))
    client.take(engine.step().chunks)
    assert engine.abort_ingress("ingress") == 3 and engine.abort_ingress("ingress") == 0
    assert engine.take_chunks() == [] and engine.requests() == ("stays",)
    run(engine, client)
    check(stays, client)
    assert_clean(engine)


def test_abort_of_an_older_epoch_spares_a_newer_owner():
    engine = make_engine()
    engine.add_request(make_request("r", [1, 2], epoch=7))
    assert not engine.abort("r", up_to_epoch=6) and engine.requests() == ("r",)
    assert engine.abort("r", up_to_epoch=7) and engine.requests() == ()
    assert engine.take_chunks() == [], "a fenced owner ends silently"
    with pytest.raises(RequestError, match="aborted before it arrived"):
        engine.add_request(make_request("r", [1, 2], epoch=7))
    engine.add_request(make_request("r", [1, 2], epoch=8))
    engine.abort("late")
    with pytest.raises(RequestError, match="aborted before it arrived"):
        engine.add_request(make_request("late", [1, 2], epoch=10**18))


def test_same_id_twice_is_refused_but_a_newer_epoch_takes_over():
    engine, client = make_engine(), Client()
    engine.add_request(make_request("r", range(1, 40), epoch=1))
    engine.step()
    with pytest.raises(RequestError, match="already being served"):
        engine.add_request(make_request("r", range(1, 40), epoch=1))
    engine.add_request(make_request("r", range(1, 40), epoch=2))
    run(engine, client)
    check(make_request("r", range(1, 40)), client)
    assert {c.epoch for c in client.chunks["r"]} == {2}
    assert_clean(engine)


@pytest.mark.parametrize(
    ("request_", "param", "words"),
    [
        (make_request("r", []), "prompt", "empty"),
        (make_request("r", [1] * 200), "prompt", "context length"),
        (make_request("r", [1] * 50, max_tokens=10**9), "max_tokens", "context length"),
        (make_request("r", [1] * 50, max_tokens=40), "max_tokens", "all KV memory"),
        (make_request("r", [1] * 81, max_tokens=1), "prompt", "all KV memory"),
        (make_request("r", [VOCAB]), "prompt", "token id"),
        (make_request("r", [-1]), "prompt", "token id"),
        (make_request("r", [1], temperature=float("nan")), "temperature", "temperature"),
        (make_request("r", [1], stop=("x",) * 10_000), "stop", "10000"),
    ],
)
def test_what_can_never_be_served_is_refused_at_the_door(request_, param, words):
    engine = make_engine(blocks=5, context=100)
    with pytest.raises(RequestError, match=words) as refused:
        engine.add_request(request_)
    assert refused.value.param == param
    assert not engine.has_work()


def test_the_largest_request_that_fits_runs_to_its_end():
    engine, client = make_engine(blocks=5, context=100, watermark=0.5), Client()
    request = make_request("r", [1] * 50, max_tokens=30, ignore_eos=True)
    engine.add_request(request)
    run(engine, client)
    check(request, client)
    assert_clean(engine)


def test_one_bad_token_fails_its_request_only():
    engine, client = make_engine(), Client()
    good, bad = make_request("good", range(1, 20)), make_request("bad", [9, 9, 9], ignore_eos=True)
    original = engine.tokenizer.token_bytes
    poison = expected(bad).token_ids[4]

    def token_bytes(token_id: int) -> bytes:
        if token_id == poison:
            raise KeyError("no such piece")
        return original(token_id)

    engine.tokenizer.token_bytes = token_bytes
    if poison not in expected(good).token_ids:
        engine.add_request(good)
    engine.add_request(bad)
    run(engine, client)
    last = client.chunks["bad"][-1]
    assert last.finish_reason == "error" and "no such piece" in last.error
    first_bad = expected(bad).token_ids.index(poison)
    assert client.result("bad").token_ids == expected(bad).token_ids[:first_bad]
    if "good" in client.chunks:
        check(good, client)
    assert_clean(engine)


def test_a_failing_model_ends_every_request_with_an_error():
    engine = make_engine(max_num_seqs=2)
    for i in range(4):
        engine.add_request(make_request(f"r{i}", range(1, 30)))
    engine.model.fail_at = 3
    outputs = [engine.step() for _ in range(3)]
    assert outputs[1].failure is None and isinstance(outputs[2].failure, RuntimeError)
    ended = {c.request_id: c for c in outputs[2].chunks}
    assert set(ended) == {"r0", "r1", "r2", "r3"}
    assert all(c.finish_reason == "error" and "told to fail" in c.error for c in ended.values())
    assert_clean(engine)


def test_eos_before_min_tokens_is_never_drawn():
    for seed in range(20):
        request = make_request("r", [seed + 1], temperature=1.5, seed=seed, min_tokens=30, max_tokens=60)
        engine, client = make_engine(), Client()
        engine.add_request(request)
        run(engine, client)
        check(request, client)
        assert EOS not in client.result("r").token_ids[:30]


def test_load_counts_what_is_there():
    engine = make_engine(blocks=12, max_num_seqs=2)
    for i in range(4):
        engine.add_request(make_request(f"r{i}", [i + 1] * 20, priority=i // 3, arrival=float(i), ignore_eos=True))
    engine.step()
    load = engine.load()
    assert load.total_blocks == 12 and load.step == 1 and load.block_size == 16
    assert [r.request_id for r in load.running] == ["r3", "r0"] and [r.request_id for r in load.waiting] == ["r1", "r2"]
    assert load.running[0].priority == 1 and load.running[0].prefilled and load.running[0].tokens == 21
    assert [r.blocks for r in load.running] == [2, 2] and [r.blocks for r in load.waiting] == [2, 2]
    assert load.free_blocks == 12 - 4
    assert isinstance(hash(load), int), "plain, immutable data"


def test_chunks_carry_what_the_ingress_needs():
    engine, client = make_engine(), Client()
    engine.add_request(make_request("r", range(1, 20), epoch=5, logprobs=0))
    run(engine, client)
    first: TokenChunk = client.chunks["r"][0]
    assert (first.epoch, first.index, first.ingress_id, first.prompt_tokens) == (5, 0, "ingress", 19)
    assert first.logprobs is not None and first.logprobs[0].token_id == first.token_ids[0]
    assert first.time > 0


def test_neighbouring_epochs_of_nanoseconds_are_told_apart():
    engine, epoch = make_engine(), 1_795_000_000_123_456_789
    engine.abort("late", epoch - 1)
    engine.add_request(make_request("late", [1, 2], epoch=epoch))
    assert engine.requests() == ("late",)
    engine.abort("late", epoch)
    with pytest.raises(RequestError, match="aborted before it arrived"):
        engine.add_request(make_request("late", [1, 2], epoch=epoch))
