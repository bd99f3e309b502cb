"""The ingress's journal of one request: which tokens the client has, under which fencing epoch. Pure; no Ray, no clock.

Chunks arrive from whichever instance runs the request, possibly twice (sent again after a migration) and possibly late
(from an instance that lost the request). The journal decides what of a chunk is new:

- a chunk of an older epoch than the newest one seen is dropped: its sender no longer owns the request;
- tokens whose index the journal already holds are skipped;
- a chunk that starts beyond the journal's end is a protocol error (tokens were lost) and raises ``JournalError``;
- nothing is accepted after the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.llumnix.engine.request import FinishReason, TokenChunk, TokenLogprob


class JournalError(RuntimeError):
    """An instance broke the protocol: tokens are missing between the journal's end and the chunk's beginning."""


@dataclass(frozen=True)
class Delta:
    """What one chunk adds to the client's stream."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    time: float = 0.0
    """Seconds, ``time.monotonic()`` of the instance's host at the end of the step that produced the tokens."""


@dataclass
class Journal:
    """Tokens of one request in order, with the newest fencing epoch. ``accept`` is the only way in."""

    request_id: str
    epoch: int = 0
    token_ids: list[int] = field(default_factory=list)
    finished: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    num_preemptions: int = 0
    dropped_chunks: int = 0
    """Chunks of which nothing was new (older epoch, sent again, or after the end)."""
    _text_length: int = 0
    _text_offset_at: dict[int, int] = field(default_factory=lambda: {0: 0})
    """Token index of a chunk boundary -> characters emitted before it; lets a chunk that overlaps be cut in its text."""

    def fence(self, epoch: int) -> None:
        """Refuse everything older than ``epoch`` from now on (a new owner was appointed)."""
        self.epoch = max(self.epoch, epoch)

    def close(self) -> None:
        """Accept nothing any more: the client has gone or has been told of an error."""
        self.finished = True

    def accept(self, chunk: TokenChunk) -> Delta | None:
        """Take one chunk in; returns what is new in it, or None. Raises JournalError on a gap or a contradiction."""
        if chunk.request_id != self.request_id:
            raise JournalError(f"chunk of request {chunk.request_id} was given to the journal of {self.request_id}")
        if self.finished or chunk.epoch < self.epoch:
            self.dropped_chunks += 1
            return None
        have, end = len(self.token_ids), chunk.index + len(chunk.token_ids)
        if chunk.index > have:
            raise JournalError(
                f"request {self.request_id}: tokens {have} to {chunk.index - 1} are missing "
                f"(chunk of epoch {chunk.epoch} starts at {chunk.index})"
            )
        overlap = have - chunk.index
        repeated = chunk.token_ids[:overlap]
        if repeated != tuple(self.token_ids[chunk.index : chunk.index + len(repeated)]):
            raise JournalError(
                f"request {self.request_id}: epoch {chunk.epoch} sends other tokens for positions "
                f"{chunk.index} to {min(end, have) - 1} than were sent before"
            )
        self.epoch = chunk.epoch
        if chunk.finish_reason is None and end <= have and overlap > 0:
            self.dropped_chunks += 1
            return None
        if end < have and chunk.finish_reason in ("stop", "length"):
            raise JournalError(
                f"request {self.request_id}: epoch {chunk.epoch} ends the request after {end} tokens, "
                f"but {have} were sent before"
            )
        text = "" if end < have else self._new_text(chunk)
        new_tokens = chunk.token_ids[overlap:]
        self.token_ids.extend(new_tokens)
        self._text_length += len(text)
        self._text_offset_at[len(self.token_ids)] = self._text_length
        self.finished = chunk.finish_reason is not None
        self.prompt_tokens = chunk.prompt_tokens or self.prompt_tokens
        self.cached_tokens = max(self.cached_tokens, chunk.cached_tokens)
        self.num_preemptions = max(self.num_preemptions, chunk.num_preemptions)
        return Delta(
            text=text,
            token_ids=new_tokens,
            logprobs=None if chunk.logprobs is None else chunk.logprobs[overlap:],
            finish_reason=chunk.finish_reason,
            stop_reason=chunk.stop_reason,
            error=chunk.error,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            time=chunk.time,
        )

    def _new_text(self, chunk: TokenChunk) -> str:
        before = self._text_offset_at.get(chunk.index)
        if before is None:
            raise JournalError(
                f"request {self.request_id}: chunk of epoch {chunk.epoch} starts at token {chunk.index}, "
                "inside a chunk sent before, so its text cannot be divided"
            )
        return chunk.text[self._text_length - before :]
