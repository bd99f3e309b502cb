"""What goes into an engine and what comes out: requests with their sampling parameters, and tagged chunks of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


class RequestError(ValueError):
    """The request can never be served (bad sampling value, too long for the context or the KV memory); says why in a sentence.

    ``param`` names the offending field for an OpenAI-shaped error.
    """

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. ``temperature == 0`` is greedy. Validated by ``validate`` (raises RequestError)."""

    temperature: float = 1.0
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    """The random number of a token is a function of (seed, position) alone."""
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    """Number of alternatives reported beside the chosen token; None reports nothing, 0 the chosen token alone."""


@dataclass(frozen=True)
class Request:
    """One sequence to complete. An OpenAI call with n > 1 becomes n requests that share the prompt's cached blocks."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival_time: float
    """Seconds since the epoch at which the ingress received it."""
    epoch: int = 0
    """Fencing epoch given by the scheduler; tokens are tagged with it."""
    priority: int = 0
    """Larger is more urgent."""
    ingress_id: str = ""
    """Whose outbox receives the tokens."""
    output_token_ids: tuple[int, ...] = ()
    """Tokens generated earlier elsewhere (continuation from a journal); their KV is recomputed."""


@dataclass(frozen=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenChunk:
    """Consecutive tokens of one request. ``index`` counts the request's output tokens from 0 and is the first one's."""

    request_id: str
    epoch: int
    index: int
    token_ids: tuple[int, ...]
    text: str
    """Text that became final with these tokens; a possible beginning of a stop string is held back."""
    ingress_id: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the request."""
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    num_preemptions: int = 0
    time: float = 0.0
    """``time.monotonic()`` of the instance's host at the end of the step that produced them."""


@dataclass(frozen=True)
class SequenceSnapshot:
    """Everything but the KV blocks that a request needs to go on elsewhere bit for bit.

    The sampler's state is (seed, position) and the penalties' counts follow from the tokens, so both travel as tokens.
    """

    request: Request
    output_token_ids: tuple[int, ...]
    num_computed_tokens: int
    """Tokens whose keys and values are in the blocks (the last sampled token's are not)."""
    block_hashes: tuple[bytes, ...]
    """Chained content hashes of the full blocks, for the destination's prefix cache."""
    text_state: bytes
    """Incremental detokenizer and stop-string buffer."""
    num_preemptions: int
    cached_tokens: int
    num_migrations: int = 0
    unacked: tuple[TokenChunk, ...] = field(default=())
    """Chunks the ingress has not acknowledged; the destination sends them again under the new epoch."""
