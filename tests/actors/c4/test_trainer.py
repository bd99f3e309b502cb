"""What the trainer adds to the policy: how far the job can shrink, and how long it still runs."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest

from actors.c4.diagnosis.verdict import Culprit, FaultKind, Verdict
from actors.c4.recovery.policy import Action, Prices, Situation
from actors.c4.recovery.settings import C4Settings
from actors.c4.trainer import JobPolicy

SLOW = Verdict(FaultKind.WORK_SLOW, Culprit((3,), nodes=("n3",)), ("seen",), 1.0, 0.0, 1.0, slowdown=2.0)
LATE = Situation(step_s=0.0, running_s=100.0, slow_s=60.0, spare_nodes=1, nodes=4, world_size=8)


def test_near_the_end_of_the_run_a_slow_rank_is_lived_with() -> None:
    prices = Prices(restart_s=10.0)
    assert JobPolicy(prices, 8, 8)(SLOW, LATE).action is Action.EVICT
    assert JobPolicy(prices, 8, 8, ends_at=time.time() + 1000)(SLOW, LATE).action is Action.EVICT
    ending = JobPolicy(prices, 8, 8, ends_at=time.time() + 5)(SLOW, LATE)
    assert ending.action is Action.IGNORE
    assert "the rest of the job loses at most" in ending.reason
    assert JobPolicy(prices, 8, 8, ends_at=time.time() - 5)(SLOW, LATE).action is Action.IGNORE


def test_without_spare_nodes_only_an_elastic_job_gives_a_node_up() -> None:
    crowded = replace(LATE, spare_nodes=0)
    assert JobPolicy(Prices(), 8, 8)(SLOW, crowded).action is Action.IGNORE
    assert JobPolicy(Prices(), 4, 8)(SLOW, crowded).action is Action.EVICT


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan])
def test_an_impossible_duration_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="expected_run_s must be positive"):
        C4Settings(expected_run_s=seconds)
