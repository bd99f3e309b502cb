"""What can go wrong in planning paths, as sentences that a user can act on."""

from __future__ import annotations


class PathError(Exception):
    """A topology, workload or plan that cannot be."""


class UnreachableError(PathError):
    """Failures have left no path between two NICs."""


class FabricError(PathError):
    """The namespace fabric cannot be built, or a command in it failed."""
