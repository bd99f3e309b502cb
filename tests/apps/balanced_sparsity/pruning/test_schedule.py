"""Schedules: their bounds, their shape, and the published formula of the cubic one."""

from __future__ import annotations

from itertools import pairwise

import pytest

from apps.balanced_sparsity.pruning.schedule import GradualSchedule


@pytest.mark.parametrize("kind", ["cubic", "linear", "paper"])
def test_rises_from_start_to_end_in_steps(kind):
    schedule = GradualSchedule(0.1, 0.9, 20, 120, 10, kind)
    values = [schedule.sparsity(step) for step in range(200)]
    assert values[:20] == [0.0] * 20
    assert values[20] == pytest.approx(0.1)
    assert values[120:] == [0.9] * 80
    assert values == sorted(values)
    assert all(values[step] == values[step - step % 10] for step in range(20, 120))
    assert len(set(values)) == 12


def test_formulas():
    assert GradualSchedule(0.2, 0.8, 0, 100, 1, "cubic").sparsity(50) == pytest.approx(0.8 - 0.6 * 0.5**3)
    assert GradualSchedule(0.2, 0.8, 0, 100, 1, "linear").sparsity(25) == pytest.approx(0.35)
    assert GradualSchedule(0.0, 0.75, 0, 100, 1, "paper").sparsity(50) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["cubic", "paper"])
def test_increments_decrease(kind):
    schedule = GradualSchedule(0.0, 0.9, 0, 100, 10, kind)
    values = [schedule.sparsity(step) for step in range(0, 101, 10)]
    increments = [after - before for before, after in pairwise(values)]
    assert increments == sorted(increments, reverse=True)


def test_at_once():
    schedule = GradualSchedule(0.0, 0.5, 0, 0, 10)
    assert schedule.sparsity(0) == 0.5


def test_end_is_reached_though_every_does_not_divide():
    assert GradualSchedule(0.0, 0.5, 0, 25, 10).sparsity(25) == 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        (0.5, 0.4, 0, 1),
        (0.0, 1.0, 0, 1),
        (-0.1, 0.5, 0, 1),
        (0, 0.5, 5, 4),
        (0, 0.5, -1, 4),
        (0, 0.5, 0, 4, 0),
        (0, 0.5, 0, 4, 1, "square"),
    ],
)
def test_bounds_out_of_order_are_refused(wrong):
    with pytest.raises(ValueError):
        GradualSchedule(*wrong)
