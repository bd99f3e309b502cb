"""The errors of MIG geometry: a GPU, a profile or a placement that is not possible."""

from __future__ import annotations


class GeometryError(ValueError):
    """A GPU, profile, placement or layout that is not possible; the text is one sentence that says why."""


class UnknownGpu(GeometryError):
    """No GPU of the tables has this name."""


class UnknownProfile(GeometryError):
    """The GPU has no such profile."""


class IllegalPlacement(GeometryError):
    """The profile exists, but not there or not beside what is there."""
