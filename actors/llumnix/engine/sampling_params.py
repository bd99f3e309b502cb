"""Checks of a request's sampling parameters and length, before it enters an engine. Used by the ingress and by the engine."""

from __future__ import annotations

import math

from actors.llumnix.engine.request import RequestError, SamplingParams

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
"""Characters of one stop string."""
MAX_LOGPROBS = 20


def validate(sampling: SamplingParams, vocab_size: int | None = None) -> None:
    """Raise RequestError, naming the parameter, unless every value is of its type and in its range (OpenAI's and vLLM's)."""
    _real("temperature", sampling.temperature, 0.0, 2.0)
    _integer("top_k", sampling.top_k, 0, None)
    _real("top_p", sampling.top_p, 0.0, 1.0, low_open=True)
    _real("min_p", sampling.min_p, 0.0, 1.0)
    _real("repetition_penalty", sampling.repetition_penalty, 0.0, 10.0, low_open=True)
    _real("presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    _real("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    _integer("seed", sampling.seed, -(2**63), 2**63 - 1)
    _integer("max_tokens", sampling.max_tokens, 1, None)
    _integer("min_tokens", sampling.min_tokens, 0, sampling.max_tokens)
    if sampling.logprobs is not None:
        _integer("logprobs", sampling.logprobs, 0, MAX_LOGPROBS)
    if len(sampling.stop) > MAX_STOP_STRINGS:
        raise RequestError(f"stop has {len(sampling.stop)} strings; at most {MAX_STOP_STRINGS} are allowed", "stop")
    for stop in sampling.stop:
        if not isinstance(stop, str) or not stop:
            raise RequestError("stop must hold non-empty strings", "stop")
        if len(stop) > MAX_STOP_LENGTH:
            raise RequestError(
                f"stop holds a string of {len(stop)} characters; at most {MAX_STOP_LENGTH} are allowed", "stop"
            )
    if len(sampling.stop_token_ids) > MAX_STOP_STRINGS:
        raise RequestError(
            f"stop_token_ids has {len(sampling.stop_token_ids)} ids; at most {MAX_STOP_STRINGS} are allowed",
            "stop_token_ids",
        )
    for token_id in sampling.stop_token_ids:
        _integer("stop_token_ids", token_id, 0, None if vocab_size is None else vocab_size - 1)


def validate_length(prompt_tokens: int, max_tokens: int, context: int, kv_tokens: int | None = None) -> None:
    """Raise RequestError unless prompt and output fit into ``context`` and into all KV memory (both in tokens)."""
    if prompt_tokens < 1:
        raise RequestError("the prompt is empty", "prompt")
    for limit, what in ((context, "the context length"), (kv_tokens, "all KV memory of an instance")):
        if limit is None or prompt_tokens + max_tokens <= limit:
            continue
        if prompt_tokens >= limit:
            raise RequestError(f"the prompt has {prompt_tokens} tokens; {what} is {limit} tokens", "prompt")
        raise RequestError(
            f"the prompt has {prompt_tokens} tokens and max_tokens asks for {max_tokens} more, "
            f"together {prompt_tokens + max_tokens}; {what} is {limit} tokens",
            "max_tokens",
        )


def _real(name: str, value: object, low: float, high: float, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"{name} must be a number, not {value!r}", name)
    # `not (a < b)` instead of `a >= b`, so that NaN fails as well.
    if not math.isfinite(value) or not (low < value if low_open else low <= value) or not value <= high:
        bracket = "(" if low_open else "["
        raise RequestError(f"{name} must be in {bracket}{low:g}, {high:g}], not {value}", name)


def _integer(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, not {value!r}", name)
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise RequestError(f"{name} must be {limits}, not {value}", name)
