"""Response objects of the OpenAI API, from token deltas: whole bodies, stream events, usage, both shapes of logprobs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.llumnix.engine.request import TokenLogprob
from actors.llumnix.journal import Delta

DONE = b"data: [DONE]\n\n"


class TokenText(Protocol):
    """What is asked of a tokenizer here."""

    def token_bytes(self, token_id: int) -> bytes: ...


def event(payload: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """OpenAI's usage object, in tokens; ``cached_tokens`` of the prompt came from the prefix cache."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


@dataclass
class Choice:
    """What one choice has produced so far."""

    index: int
    text: str = ""
    """Begins with the prompt when the client asked for ``echo``."""
    num_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def add(self, delta: Delta) -> None:
        """Take one delta in."""
        self.text += delta.text
        self.num_tokens += len(delta.token_ids)
        self.logprobs.extend(delta.logprobs or ())
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_reason = delta.stop_reason if delta.stop_reason is not None else self.stop_reason
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)


class ResponseBuilder:
    """Builds every object of one response; ``chat`` chooses between the two endpoints' shapes."""

    def __init__(self, response_id: str, created: int, model: str, chat: bool, tokenizer: TokenText, logprobs: bool):
        self.response_id, self.created, self.model, self.chat = response_id, created, model, chat
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._text_offset: dict[int, int] = {}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.response_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def whole(self, choices: Sequence[Choice], total: dict[str, Any]) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        built = []
        for choice in choices:
            entry: dict[str, Any] = {"index": choice.index}
            if self.chat:
                entry["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            else:
                entry["text"] = choice.text
            entry["logprobs"] = self._logprobs_object(choice.index, choice.logprobs) if self._logprobs else None
            entry["finish_reason"] = choice.finish_reason
            entry["stop_reason"] = choice.stop_reason
            built.append(entry)
        return self._envelope("chat.completion" if self.chat else "text_completion", built) | {"usage": total}

    def opening(self, index: int, echo: str) -> dict[str, Any] | None:
        """The first event of a choice: the role of a chat message, or the echoed prompt of a completion."""
        if self.chat:
            return self._chunk(index, {"role": "assistant", "content": ""}, None, None, None)
        return self._chunk(index, echo, None, None, None) if echo else None

    def delta(self, index: int, delta: Delta) -> dict[str, Any]:
        """The event of one delta."""
        content: Any = delta.text
        if self.chat:
            content = {"content": delta.text} if delta.text or delta.finish_reason is None else {}
        logprobs = self._logprobs_object(index, delta.logprobs or ()) if self._logprobs else None
        return self._chunk(index, content, logprobs, delta.finish_reason, delta.stop_reason)

    def usage_event(self, total: dict[str, Any]) -> dict[str, Any]:
        """The last event when the client asked for ``stream_options.include_usage``."""
        return self._envelope("chat.completion.chunk" if self.chat else "text_completion", []) | {"usage": total}

    def _chunk(
        self, index: int, content: Any, logprobs: Any, finish_reason: str | None, stop_reason: str | int | None
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta" if self.chat else "text": content,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        if finish_reason is not None:
            choice["stop_reason"] = stop_reason
        return self._envelope("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def _logprobs_object(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        if self.chat:
            return {"content": [self._chat_logprob(entry) for entry in logprobs], "refusal": None}
        tokens = [self._text(entry.token_id) for entry in logprobs]
        offsets, offset = [], self._text_offset.get(index, 0)
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._text_offset[index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [{self._text(token_id): logprob for token_id, logprob in entry.top} for entry in logprobs],
            "text_offset": offsets,
        }

    def _chat_logprob(self, entry: TokenLogprob) -> dict[str, Any]:
        return {
            **self._token_entry(entry.token_id, entry.logprob),
            "top_logprobs": [self._token_entry(token_id, logprob) for token_id, logprob in entry.top],
        }

    def _token_entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")
