"""Every parameter out of its range or of another type is refused by its name; every value at the edge is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors.llumnix.engine.request import RequestError, SamplingParams
from actors.llumnix.engine.sampling_params import validate, validate_length

GOOD = SamplingParams()


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", float("nan")), ("temperature", float("inf")),
        ("temperature", "1"), ("temperature", True), ("temperature", None),
        ("top_k", -1), ("top_k", 1.5), ("top_k", True),
        ("top_p", 0.0), ("top_p", 1.01), ("top_p", float("nan")),
        ("min_p", -0.1), ("min_p", 1.1),
        ("repetition_penalty", 0.0), ("repetition_penalty", -1.0), ("repetition_penalty", float("inf")),
        ("presence_penalty", 2.5), ("presence_penalty", -2.5), ("frequency_penalty", float("nan")),
        ("seed", 2**63), ("seed", 0.5),
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.0), ("max_tokens", None),
        ("min_tokens", -1), ("min_tokens", 17),
        ("logprobs", -1), ("logprobs", 21), ("logprobs", True),
        ("stop", ("x",) * 10_000), ("stop", ("",)), ("stop", (1,)), ("stop", ("x" * 100_000,)),
        ("stop_token_ids", (-1,)), ("stop_token_ids", (100,)), ("stop_token_ids", ("a",)), ("stop_token_ids", (1,) * 1000),
    ],
)  # fmt: skip
def test_bad_values_are_named(name, bad):
    with pytest.raises(RequestError) as refused:
        validate(replace(GOOD, **{name: bad}), vocab_size=100)
    assert refused.value.param == name and name in str(refused.value)


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("temperature", 0), ("temperature", 2.0), ("top_k", 10**9), ("top_p", 1), ("top_p", 1e-9), ("min_p", 1.0),
        ("repetition_penalty", 0.01), ("presence_penalty", -2.0), ("frequency_penalty", 2), ("seed", -(2**63)),
        ("max_tokens", 10**12), ("min_tokens", 16), ("logprobs", 0), ("logprobs", 20), ("stop", ("x",) * 64),
        ("stop_token_ids", (0, 99)),
    ],
)  # fmt: skip
def test_values_at_the_edge_are_taken(name, good):
    validate(replace(GOOD, **{name: good}), vocab_size=100)


def test_length():
    validate_length(50, 50, 100, 100)
    for args, param in (((0, 1, 100), "prompt"), ((50, 51, 100), "max_tokens"), ((100, 1, 100), "prompt")):
        with pytest.raises(RequestError) as refused:
            validate_length(*args)
        assert refused.value.param == param
    with pytest.raises(RequestError, match="KV memory"):
        validate_length(50, 40, 100, 80)
