"""The packed parameters against the kernel's own packing of plain rows, and real draws that depend on nothing but the request."""

from __future__ import annotations

from dataclasses import fields

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.llumnix.engine.sampler import Sampler
from actors.llumnix.engine.sequence import Sequence
from kernels.sampling import SamplingBatch, SamplingRow, TokenCounts
from tests.actors.llumnix.engine.fakes import (
    EOS,
    VOCAB,
    Client,
    FakeModel,
    assert_clean,
    logits_of,
    make_engine,
    make_request,
    run,
)

parameters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0]),
        "top_k": st.sampled_from([0, 5]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.4]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, -0.5]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "logprobs": st.sampled_from([None, 0, 4]),
        "min_tokens": st.sampled_from([0, 0, 4]),
        "stop_token_ids": st.sampled_from([(), (3, 9)]),
        "ignore_eos": st.booleans(),
        "max_tokens": st.just(30),
    }
)
ids = st.lists(st.integers(0, VOCAB - 1), max_size=12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(parameters, ids.filter(bool), ids), min_size=1, max_size=6))
def test_packed_parameters_equal_the_kernels_own(rows):
    sequences, plain = [], []
    sampler = Sampler(8, VOCAB)
    for i, (params, prompt, output) in enumerate(rows):
        seq = Sequence(make_request(f"r{i}", prompt, **params), frozenset({EOS}), 4)
        sampler.batch([seq])  # Packed at its first token; the others are appended one by one.
        for token in output:
            seq.append(token)
        sequences.append(seq)
        stops = {*params["stop_token_ids"], *([] if params["ignore_eos"] else [EOS])}
        plain.append(
            SamplingRow(
                **{k: params[k] for k in ("temperature", "top_k", "top_p", "min_p", "seed")},
                **{k: params[k] for k in ("repetition_penalty", "presence_penalty", "frequency_penalty")},
                position=len(prompt) + len(output),
                num_logprobs=-1 if params["logprobs"] is None else params["logprobs"],
                counts=TokenCounts(prompt, output),
                banned_ids=sorted(stops) if len(output) < params["min_tokens"] else (),
            )
        )
    got, want = sampler.batch(sequences), SamplingBatch.from_rows(plain)
    for f in fields(SamplingBatch):
        a, b = getattr(got, f.name), getattr(want, f.name)
        assert a.dtype == b.dtype and torch.equal(a, b), f.name


REQUESTS = [
    make_request(f"r{i}", [i + 1, 2, 3] * (i + 1), arrival=float(i), max_tokens=20 + i, ignore_eos=i % 2 == 0, **extra)
    for i, extra in enumerate(
        [
            {},
            {"temperature": 1.0, "seed": 5, "logprobs": 3},
            {"temperature": 0.8, "top_p": 0.9, "top_k": 30, "repetition_penalty": 1.3},
            {"temperature": 1.0, "min_p": 0.05, "presence_penalty": 1.0, "frequency_penalty": 0.5, "min_tokens": 10},
            {"repetition_penalty": 1.5, "logprobs": 0, "stop": ("日日",)},
        ]
    )
]


def test_real_draws_alone_in_a_batch_and_preempted_are_equal():
    alone = Client()
    for request in REQUESTS:
        engine = make_engine(reference_sampler=False)
        engine.add_request(request)
        run(engine, alone)
    for settings_ in ({}, {"blocks": 7}, {"max_batched_tokens": 3, "max_num_seqs": 2}):
        engine, client = make_engine(reference_sampler=False, **settings_), Client()
        for request in REQUESTS:
            engine.add_request(request)
        run(engine, client)
        for request in REQUESTS:
            assert client.result(request.request_id) == alone.result(request.request_id)
        assert_clean(engine)


def test_logprobs_are_the_log_softmax_of_what_the_model_said():
    engine, client = make_engine(reference_sampler=False), Client()
    engine.add_request(REQUESTS[1])
    run(engine, client)
    tokens = list(REQUESTS[1].prompt_token_ids)
    for chunk in client.chunks["r1"]:
        want = torch.log_softmax(torch.from_numpy(logits_of(tokens, list(range(len(tokens))))).double(), 0)
        (reported,) = chunk.logprobs
        assert reported.token_id == chunk.token_ids[0]
        assert abs(reported.logprob - want[reported.token_id]) < 1e-5
        best = want.topk(3)
        assert [t for t, _ in reported.top] == best.indices.tolist()
        assert max(abs(a - b) for (_, a), b in zip(reported.top, best.values.tolist(), strict=True)) < 1e-5
        tokens.append(reported.token_id)


def test_logits_that_are_not_numbers_fail_their_request_only():
    engine, client = make_engine(reference_sampler=False), Client()
    model: FakeModel = engine.model
    model.nan_after = [7, 7, 7]
    engine.add_request(make_request("bad", [7, 7, 7], logprobs=1))
    engine.add_request(REQUESTS[1])
    run(engine, client)
    assert client.result("bad").finish_reason == "error" and client.result("bad").token_ids == []
    assert "not numbers" in client.chunks["bad"][0].error
    alone = Client()
    other = make_engine(reference_sampler=False)
    other.add_request(REQUESTS[1])
    run(other, alone)
    assert client.result("r1") == alone.result("r1")
    assert_clean(engine)
