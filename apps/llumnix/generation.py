"""From a validated request body to engine requests: prompts to tokens, sampling parameters, limits, seeds of n choices."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from dataclasses import dataclass
from typing import Any, Protocol

from actors.llumnix.engine.request import Request, SamplingParams
from apps.llumnix.openai_api import MAX_CHOICES, ApiError, ChatBody, CompletionBody

_LONG_TEXT = 4096  # characters from which tokenizing is moved off the event loop


class PromptTokenizer(Protocol):
    """The part of the engine's tokenizer that the ingress uses."""

    vocab_size: int

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...


@dataclass(frozen=True)
class ModelCard:
    """What the ingress knows of the model it serves."""

    name: str
    aliases: tuple[str, ...]
    """Other names accepted in ``model`` (the configured path or hub name)."""
    max_model_len: int
    """Longest prompt + output, tokens."""
    created: int

    def check(self, name: str) -> None:
        """Raises the 404 of OpenAI when ``name`` is not this model."""
        if name != self.name and name not in self.aliases:
            raise ApiError(
                f"The model '{name}' does not exist; this server serves '{self.name}'.",
                status=404,
                param="model",
                code="model_not_found",
            )


@dataclass(frozen=True)
class Generation:
    """One API call as engine requests: choice i is ``requests[i]``, its echoed prompt ``echoes[i]``."""

    response_id: str
    created: int
    requests: tuple[Request, ...]
    echoes: tuple[str, ...]
    group_size: int
    """Consecutive requests that share a prompt (n)."""

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens, each prompt counted once however many choices it has."""
        return sum(len(request.prompt_token_ids) for request in self.requests[:: self.group_size])


def derived_seed(seed: int, choice: int) -> int:
    """Seed of choice ``choice`` of a call with ``seed``: the first choice's is the seed itself (mod 2**63)."""
    if choice == 0:
        return seed % 2**63
    digest = hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


async def plan_completion(body: CompletionBody, card: ModelCard, tokenizer: PromptTokenizer) -> Generation:
    """Engine requests of a /v1/completions call; raises ApiError."""
    card.check(body.model)
    prompts = body.prompts()
    n = body.n or 1
    if len(prompts) * n > MAX_CHOICES:
        raise ApiError(f"{len(prompts)} prompts x n={n} are more than {MAX_CHOICES} choices.", param="n")
    tokens, echoes = [], []
    for prompt in prompts:
        ids = prompt if isinstance(prompt, list) else await _off_loop(len(prompt), tokenizer.encode, prompt)
        if any(token >= tokenizer.vocab_size for token in ids):
            raise ApiError(f"prompt holds a token id that is not below {tokenizer.vocab_size}.", param="prompt")
        tokens.append(ids)
        echoes.append((prompt if isinstance(prompt, str) else tokenizer.decode(ids)) if body.echo else "")
    return _generation("cmpl-", body, card, tokens, echoes, body.max_tokens, body.logprobs, default_max_tokens=16)


async def plan_chat(body: ChatBody, card: ModelCard, tokenizer: PromptTokenizer) -> Generation:
    """Engine requests of a /v1/chat/completions call; raises ApiError."""
    card.check(body.model)
    messages = [message.template_message() for message in body.messages]
    length = sum(len(message["content"]) for message in messages)
    try:
        ids = await _off_loop(length, tokenizer.apply_chat_template, messages)
    except Exception as error:  # templates are the model's own code and refuse in their own ways
        raise ApiError(f"The model's chat template refuses these messages: {error}", param="messages") from error
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _generation("chatcmpl-", body, card, [ids], [""], body.token_limit(), logprobs)


def _generation(
    prefix: str,
    body: CompletionBody | ChatBody,
    card: ModelCard,
    prompts: list[list[int]],
    echoes: list[str],
    max_tokens: int | None,
    logprobs: int | None,
    default_max_tokens: int | None = None,
) -> Generation:
    response_id, now, n = prefix + secrets.token_hex(12), time.time(), body.n or 1
    seed = body.seed if body.seed is not None else secrets.randbits(63)
    field = "messages" if isinstance(body, ChatBody) else "prompt"
    requests: list[Request] = []
    for ids in prompts:
        allowed = _token_limit(len(ids), max_tokens, card.max_model_len, field)
        if max_tokens is None and default_max_tokens is not None:
            allowed = min(allowed, default_max_tokens)
        if (body.min_tokens or 0) > allowed:
            raise ApiError(f"min_tokens ({body.min_tokens}) is above max_tokens ({allowed}).", param="min_tokens")
        for _ in range(n):
            choice = len(requests)
            requests.append(
                Request(
                    request_id=f"{response_id}-{choice}",
                    prompt_token_ids=tuple(ids),
                    sampling=_sampling(body, derived_seed(seed, choice), allowed, logprobs),
                    arrival_time=now,
                    priority=body.priority or 0,
                )
            )
    return Generation(response_id, int(now), tuple(requests), tuple(e for e in echoes for _ in range(n)), n)


def _token_limit(prompt_tokens: int, max_tokens: int | None, max_model_len: int, field: str) -> int:
    if prompt_tokens == 0:
        raise ApiError(f"{field} is empty: at least one token is needed.", param=field)
    room = max_model_len - prompt_tokens
    if room < 1:
        raise ApiError(
            f"This model's maximum context length is {max_model_len} tokens, but the {field} has {prompt_tokens}.",
            param=field,
            code="context_length_exceeded",
        )
    if max_tokens is not None and max_tokens > room:
        raise ApiError(
            f"This model's maximum context length is {max_model_len} tokens, but {prompt_tokens} tokens of {field} and "
            f"max_tokens={max_tokens} were asked for.",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return room if max_tokens is None else max_tokens


def _sampling(body: CompletionBody | ChatBody, seed: int, max_tokens: int, logprobs: int | None) -> SamplingParams:
    def given(value: Any, default: Any) -> Any:
        return default if value is None else value

    return SamplingParams(
        temperature=float(given(body.temperature, 1.0)),
        top_k=max(given(body.top_k, 0), 0),
        top_p=float(given(body.top_p, 1.0)),
        min_p=float(given(body.min_p, 0.0)),
        repetition_penalty=float(given(body.repetition_penalty, 1.0)),
        presence_penalty=float(given(body.presence_penalty, 0.0)),
        frequency_penalty=float(given(body.frequency_penalty, 0.0)),
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=given(body.min_tokens, 0),
        stop=body.stop_strings(),
        stop_token_ids=tuple(given(body.stop_token_ids, ())),
        ignore_eos=bool(body.ignore_eos),
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        logprobs=logprobs,
    )


async def _off_loop(length: int, function: Any, *args: Any) -> Any:
    return await asyncio.to_thread(function, *args) if length > _LONG_TEXT else function(*args)
