"""The error of the prediction room: measurements from which nothing can be predicted."""

from __future__ import annotations


class PredictionError(ValueError):
    """Measurements that are wrong or too few; the text is one sentence that says which and why."""
