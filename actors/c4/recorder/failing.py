"""How a ring operation fails: one sentence, raised here and passed on to all ranks of the ring. No torch, no Ray."""

from __future__ import annotations

import os
from typing import NoReturn

from actors.c4.recorder.errors import CollectiveError, CollectiveTimeoutError, MismatchError, PeerLostError
from actors.c4.recorder.transport import RingTransport
from actors.c4.recorder.wire import Announcement

WITNESS_S = 0.5
"""At the timeout, the rank whose own neighbour is missing speaks first; one whose neighbours are there waits this long for it."""
_WORDS: dict[type[CollectiveError], str] = {
    MismatchError: "Mismatched collective",
    PeerLostError: "Peer lost",
    CollectiveTimeoutError: "Timeout",
}


class Failure:
    """What may go wrong in one operation at one rank. Every method raises; ``rest`` is what a half-sent message still lacks."""

    def __init__(self, transport: RingTransport, announcement: Announcement, timeout_s: float):
        self.transport, self.announcement, self.timeout_s = transport, announcement, timeout_s
        self.me = transport.ranks[transport.rank]

    def mismatch(self, theirs: Announcement, rest: bytes) -> NoReturn:
        """The predecessor announced another operation."""
        self._raise(
            MismatchError,
            f"ranks are in different operations of group {self.transport.name}: rank {self.me} is in {self.announcement}, "
            f"rank {self.transport.predecessor} in {theirs}",
            rest,
        )

    def lost(self, peer: int, error: int | None, rest: bytes = b"") -> NoReturn:
        """A neighbour's connection closed; ``error`` is an errno, None for an orderly end."""
        how = f" ({os.strerror(error)})" if error else ""
        self._raise(
            PeerLostError,
            f"rank {peer} is gone: its connection to rank {self.me} closed in {self.announcement} "
            f"of group {self.transport.name}{how}",
            rest,
        )

    def told(self, text: bytes, rest: bytes) -> NoReturn:
        """A neighbour gave up: its sentence is ours."""
        reason = text.decode(errors="replace")
        self.transport.abort(reason, rest)
        raise error_kind(reason)(reason)

    def protocol(self, rest: bytes) -> NoReturn:
        """The predecessor sent something that does not belong here."""
        self._raise(
            CollectiveError,
            f"rank {self.transport.predecessor} sent rank {self.me} what does not belong to {self.announcement}",
            rest,
        )

    def timed_out(self, announced: bool, awaited: int, rest: bytes) -> NoReturn:
        """The operation's time is over."""
        peers = []
        if not announced:
            peers.append(f"rank {self.transport.predecessor} has not entered the operation")
        elif awaited:
            peers.append(f"rank {self.transport.predecessor} still owes {awaited} messages")
        if rest:
            peers.append(f"rank {self.transport.successor} does not take what is sent")
        self._raise(
            CollectiveTimeoutError,
            f"{self.announcement} of group {self.transport.name} timed out at rank {self.me} after "
            f"{self.timeout_s:.1f} s: {' and '.join(peers) or 'nothing moves'}",
            rest,
        )

    def _raise(self, kind: type[CollectiveError], what: str, rest: bytes) -> NoReturn:
        reason = f"{_WORDS.get(kind, 'Ring error')}: {what}."
        self.transport.abort(reason, rest)
        raise kind(reason)


def error_kind(reason: str) -> type[CollectiveError]:
    """The kind of error that stands in front of a reason."""
    return next((kind for kind, word in _WORDS.items() if reason.startswith(word)), CollectiveError)
