"""The error of the planner: a demand that no plan can meet, or a problem that is not well posed."""

from __future__ import annotations


class PlannerError(ValueError):
    """The text is one sentence that says which workload and why."""
