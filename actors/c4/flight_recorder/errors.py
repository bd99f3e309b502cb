"""What can be wrong with a folder of Flight Recorder dumps; each text is a sentence for the user."""

from __future__ import annotations


class FlightRecorderError(Exception):
    """The input cannot be used; the text says why and what to do."""


class RefusedPickleError(FlightRecorderError):
    """The pickle asks for more than plain containers and scalars, or is made to exhaust memory. Nothing was executed."""


class UnreadableDumpError(FlightRecorderError):
    """The file is truncated, is no dump, or cannot be read."""
