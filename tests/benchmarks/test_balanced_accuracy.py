"""The gap of an arm against a hand-worked paired t-test, and what makes a figure."""

from __future__ import annotations

import math

import pytest

from benchmarks.balanced_accuracy import Outcome, gap_of


def outcomes(arm: str, scores: list[float], higher: bool) -> list[Outcome]:
    return [Outcome("cnn", seed, arm, 75, score, higher, 0.75, 1.0) for seed, score in enumerate(scores)]


def test_points_of_accuracy_with_the_paired_interval():
    """Differences 1, 2, 3: mean 2, deviation 1, so 2 -+ 4.3027 / sqrt(3) (Student's t, 2 degrees of freedom)."""
    found = outcomes("unstructured", [90, 80, 70], True) + outcomes("balanced:32", [89, 78, 67], True)[::-1]
    gap = gap_of(found, "cnn", 75, "balanced:32")
    half = 4.302653 / math.sqrt(3)
    assert (gap.mean, gap.low, gap.high) == pytest.approx((2, 2 - half, 2 + half)) and gap.unit == "points"


def test_perplexity_is_compared_in_percent_and_more_is_worse():
    found = outcomes("unstructured", [100, 200, 50], False) + outcomes("block:8x8", [110, 220.0001, 55], False)
    gap = gap_of(found, "cnn", 75, "block:8x8")
    assert gap.mean == pytest.approx(10, rel=1e-3) and 9.9 < gap.low < gap.mean < gap.high < 10.1


def test_equal_differences_have_no_spread():
    found = outcomes("unstructured", [50, 60], True) + outcomes("balanced:32", [50, 60], True)
    gap = gap_of(found, "cnn", 75, "balanced:32")
    assert (gap.mean, gap.low, gap.high) == (0, 0, 0) and math.isnan(gap.p)
