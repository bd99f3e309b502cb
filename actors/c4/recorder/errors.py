"""Errors of the recorder: every one a sentence that a user can act on. No torch, no Ray."""

from __future__ import annotations


class RecorderError(RuntimeError):
    """The ring of a worker cannot be made (no room, no permission, a bad setting)."""


class RingFormatError(RecorderError):
    """A file is no ring, a truncated one, or one of another layout version."""


class CollectiveError(RuntimeError):
    """An operation over the recorded ring failed; the sentence names the operation, the group and the peer."""


class PeerLostError(CollectiveError):
    """A peer's connection closed: its process ended or gave up."""


class MismatchError(CollectiveError):
    """Two ranks are in different operations under one sequence number."""


class CollectiveTimeoutError(CollectiveError):
    """The group's timeout passed before the operation was done."""
