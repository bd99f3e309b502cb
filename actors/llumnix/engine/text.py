"""From tokens to text while they come: incremental UTF-8 decoding and stop strings, with a state that can travel.

Text is released only when it is final: never half a code point, never what may turn out to be the beginning of a stop
string. The released text does not depend on how the bytes were divided into tokens.
"""

from __future__ import annotations

import codecs
import json


class IncrementalText:
    """Text of one request's output.

    A stop string ends the output at the character that completes it first; of several completed by the same character
    the longest counts. ``state()`` and ``restore()`` carry the undecoded bytes and the held-back text to another instance.
    """

    def __init__(self, stop: tuple[str, ...] = (), include_stop: bool = False):
        self._stops = [_Matcher(s) for s in sorted(stop, key=len, reverse=True)]
        self._first = frozenset(s[0] for s in stop)
        self._include_stop = include_stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, token: bytes, check_stop: bool = True) -> tuple[str, str | None]:
        """Take one token's bytes; returns (text that is final now, the stop string if one is complete).

        With ``check_stop=False`` (before min_tokens) everything is released, and it can be no part of a stop string.
        """
        return self._advance(self._decoder.decode(token), check_stop)

    def finish(self, check_stop: bool = True) -> tuple[str, str | None]:
        """The output has ended: release what was held back; an incomplete code point becomes U+FFFD."""
        text, stop = self._advance(self._decoder.decode(b"", final=True), check_stop)
        if stop is None:
            text, self._held = text + self._held, ""
        return text, stop

    def state(self) -> bytes:
        """What ``restore`` needs on an object made with the same stop strings."""
        return json.dumps([self._decoder.getstate()[0].hex(), self._held]).encode()

    def restore(self, state: bytes) -> None:
        """Go on where ``state`` was taken."""
        pending, self._held = json.loads(state)
        self._decoder.setstate((bytes.fromhex(pending), 0))
        # Every partial match lies inside the held text, so it restores the matchers.
        for matcher in self._stops:
            matcher.matched = 0
            for char in self._held:
                matcher.push(char)

    def _advance(self, new: str, check_stop: bool) -> tuple[str, str | None]:
        if not self._stops:
            return new, None
        if not check_stop:
            text, self._held = self._held + new, ""
            for matcher in self._stops:
                matcher.matched = 0
            return text, None
        if not self._held and self._first.isdisjoint(new):
            return new, None
        before = len(self._held)
        text = self._held + new
        for i, char in enumerate(new):
            # All matchers advance, also after a hit: the longest comes first, so the first hit wins.
            hit = None
            for matcher in self._stops:
                if matcher.push(char) and hit is None:
                    hit = matcher.stop
            if hit is not None:
                end = before + i + 1
                self._held = ""
                return text[: end if self._include_stop else end - len(hit)], hit
        keep = max(matcher.matched for matcher in self._stops)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut], None


class _Matcher:
    """Knuth-Morris-Pratt: after each character, the length of the longest beginning of ``stop`` that the text ends with."""

    __slots__ = ("_failure", "matched", "stop")

    def __init__(self, stop: str):
        self.stop = stop
        self.matched = 0
        self._failure = failure = [0] * len(stop)
        k = 0
        for i in range(1, len(stop)):
            while k and stop[i] != stop[k]:
                k = failure[k - 1]
            k += stop[i] == stop[k]
            failure[i] = k

    def push(self, char: str) -> bool:
        """True if ``char`` completes the stop string."""
        k = self.matched
        while k and self.stop[k] != char:
            k = self._failure[k - 1]
        if self.stop[k] == char:
            k += 1
        if k == len(self.stop):
            self.matched = 0
            return True
        self.matched = k
        return False
