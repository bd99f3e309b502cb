"""Learning what workloads have in common, and the shipped prior against the data that it was learned from."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from actors.mig.prediction.predictor import make_group
from actors.mig.prediction.prior import WEAK, combine, learn, study
from actors.mig.prediction.shipped import POPULATION, SHIPPED_FAMILIES
from tests.actors.mig.prediction.synthetic import Truth, measured


def _workloads(count, bound_by_memory):
    rng = np.random.default_rng(3)
    truths = [
        Truth(float(rng.uniform(2, 12)), 0.0, float(rng.uniform(0.2, 1)), 0.5, bound_by_memory) for _ in range(count)
    ]
    return [make_group(measured(truth, noise=0.01, seed=n)).teaching(f"family-{n}") for n, truth in enumerate(truths)]


def test_the_common_share_of_bandwidth_is_learned():
    low, high = (learn(_workloads(6, share)).mean[5] for share in (0.1, 0.8))
    assert low < 0.25 < 0.5 < high


def test_agreement_narrows_the_prior():
    learned = learn(_workloads(6, 0.3))
    assert learned.sd[4] < WEAK.sd[4]
    assert learned.sd[1] < WEAK.sd[1]


def test_votes_hold_the_start_back():
    lessons = [study(one, WEAK) for one in _workloads(2, 0.9)]
    free, held = (abs(combine(lessons, WEAK, votes).mean[5] - WEAK.mean[5]) for votes in (0, 50))
    assert held < free / 10


def test_copies_of_one_family_are_not_as_many_votes():
    lone, crowd = ([study(one, WEAK) for one in _workloads(count, share)] for count, share in ((1, 0.9), (3, 0.1)))
    copies = [dataclasses.replace(lesson, family="same") for lesson in crowd]
    assert combine([*lone, *copies], WEAK).mean[5] > combine([*lone, *crowd], WEAK).mean[5]


def test_nothing_to_learn_from_leaves_the_start():
    assert learn([], POPULATION) is POPULATION


@pytest.mark.shared_data
def test_the_shipped_prior_is_what_the_published_data_teach(shared_data):
    from benchmarks.migperf.leave_out import learn_without, load_cases

    cases = load_cases(shared_data / "mig")
    learned = learn_without(cases, [])
    np.testing.assert_allclose(POPULATION.mean, learned.mean, atol=0.02)
    np.testing.assert_allclose(POPULATION.sd, learned.sd, atol=0.02)
    assert len({case.family for case in cases}) == SHIPPED_FAMILIES
