"""The errors of the backends and leases; each text is a sentence that says what to do. Nothing is left half-created."""

from __future__ import annotations


class BackendError(RuntimeError):
    """A backend cannot do what was asked."""


class BackendUnavailable(BackendError):
    """This machine lacks what the backend stands on: a GPU, a driver, a daemon, a system call."""


class NoSuchProfile(BackendError):
    """The backend has no profile of this name; the sentence lists those that it has."""


class NoRoom(BackendError):
    """What is cut already leaves no room for one more slice of this profile."""


class SliceVanished(BackendError):
    """The slice that was asked for (or held) does not exist any more."""


class SliceInUse(BackendError):
    """The slice is leased: it may be neither destroyed nor leased to one holder more."""
