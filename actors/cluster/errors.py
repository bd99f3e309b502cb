"""Errors of meeting a cluster; importable without Ray."""

from __future__ import annotations


class ClusterError(RuntimeError):
    """Ray could not be started or reached; the text is a sentence that says what to do."""
