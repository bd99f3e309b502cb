"""The story of a run: interruptions are measured from fault to first new step, and pictures can be drawn of it."""

from __future__ import annotations

import numpy as np
import pytest

from apps.c4.pictures import delay_matrix_figure, pace_figure, timeline_figure, waiting_chain_figure
from apps.c4.story import Moment, MomentKind, StepPoint, Story
from apps.program.report import png_bytes


def story() -> Story:
    """Steps 1-5 every second; fault at 5.5; named at 6.5; restarted at 9; steps 5 again at 11, 6 at 12; finished."""
    steps = [StepPoint(float(n), n, 1.0 / n, 1) for n in range(1, 6)]
    steps += [StepPoint(11.0, 5, 0.2, 2), StepPoint(12.0, 6, 0.15, 2)]
    moments = (
        Moment(0.0, MomentKind.STARTED, "generation 1"),
        Moment(5.5, MomentKind.FAULT, "SIGSTOP of rank 2"),
        Moment(6.5, MomentKind.VERDICT, "process_stopped: rank 2"),
        Moment(6.6, MomentKind.ISOLATED, "node c"),
        Moment(9.0, MomentKind.RESTARTED, "generation 2"),
        Moment(13.0, MomentKind.FINISHED, ""),
    )
    return Story(tuple(steps), moments)


def test_an_interruption_lasts_from_the_fault_to_the_first_step_that_is_new() -> None:
    (stop,) = story().interruptions()
    assert stop.detection_s == pytest.approx(1.0)
    assert stop.recovery_s == pytest.approx(12.0 - 5.5)
    assert stop.steps_repeated == 1
    assert stop.what == "SIGSTOP of rank 2"


def test_without_a_known_fault_it_begins_with_the_verdict() -> None:
    whole = story()
    without = Story(whole.steps, tuple(m for m in whole.moments if m.kind is not MomentKind.FAULT))
    (stop,) = without.interruptions()
    assert stop.fault_at_s == 6.5
    assert stop.detection_s == 0.0


def test_a_restart_that_never_trains_again_has_no_recovery_time() -> None:
    whole = story()
    (stop,) = Story(whole.steps[:5], whole.moments).interruptions()
    assert stop.recovery_s is None
    assert stop.steps_repeated == 0


def test_a_slow_fault_that_restarts_nothing_is_no_interruption() -> None:
    whole = story()
    assert Story(whole.steps[:5], whole.moments[:3]).interruptions() == ()


def test_pictures_are_drawn_of_any_size() -> None:
    matrix = np.full((4, 4), np.nan)
    matrix[[0, 1, 2, 3], [1, 2, 3, 0]] = [0.01, 0.02, 0.2, 0.01]
    figures = [
        delay_matrix_figure(matrix, hot=[(2, 3)]),
        delay_matrix_figure(np.full((4, 4), np.nan)),
        waiting_chain_figure([(0, 1), (1, 2), (3, 2)], [2], 4),
        pace_figure(np.array([0.1, 0.2]), np.array([0.1, 0.0]), [1]),
        timeline_figure(story()),
        timeline_figure(Story((), ())),
    ]
    assert all(png_bytes(figure).startswith(b"\x89PNG") for figure in figures)
