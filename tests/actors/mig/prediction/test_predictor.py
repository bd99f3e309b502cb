"""Prediction on workloads whose law is known: parameters found again, slices foretold, intervals that hold, few rows,
wrong rows."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from actors.mig.prediction import Measurement, PredictionError, predict
from actors.mig.prediction.fit import fit
from actors.mig.prediction.predictor import make_group, predict_group
from actors.mig.prediction.shipped import POPULATION
from tests.actors.mig.prediction.synthetic import BATCHES, SHARES, Truth, measured

TRUTHS = [
    (Truth(), 0.04),  # launch floor at small batches, work at large ones
    (Truth(floor_ms=2.0, sharpness=1.5), 0.05),  # the GPU is busy almost always
    (Truth(floor_ms=1.0, work_ms=0.9, bound_by_memory=0.7), 0.05),  # bandwidth more than SMs
    # The host works beside every sample, in turn with the GPU: two slices alone cannot tell that from a poor scaling.
    (Truth(floor_ms=3.0, host_ms=0.6, work_ms=0.5, sharpness=1.0), 0.15),
]


def _asked(rows, profiles):
    """The rows of ``profiles`` turned into questions, with the answers apart."""
    questions = [dataclasses.replace(row, latency_ms=None) if row.profile in profiles else row for row in rows]
    return questions, {n: row.latency_ms for n, row in enumerate(rows) if row.profile in profiles}


def _errors(rows, profiles):
    questions, answers = _asked(rows, profiles)
    found = predict(questions)
    return np.array([abs(found[n].latency_ms / answer - 1) for n, answer in answers.items()])


@pytest.mark.parametrize(("truth", "bound"), TRUTHS)
def test_slices_are_foretold_from_the_whole_gpu_and_one_slice(truth, bound):
    errors = _errors(measured(truth), ("1g.10gb", "3g.40gb", "4g.40gb"))
    assert errors.mean() < bound
    assert errors.max() < 2.5 * bound


def test_slices_are_foretold_from_the_whole_gpu_alone_when_the_sweep_shows_floor_and_work():
    assert _errors(measured(Truth()), ("1g.10gb", "2g.20gb", "3g.40gb", "4g.40gb")).mean() < 0.10


def test_slices_are_foretold_without_the_whole_gpu():
    assert _errors(measured(Truth()), ("7g.80gb", "2g.20gb", "4g.40gb")).mean() < 0.10


def test_parameters_are_found_again():
    truth = Truth(floor_ms=8.0, work_ms=0.4, bound_by_memory=0.6, sharpness=4.0)
    group = make_group(measured(truth, noise=0.003))
    theta = fit(group.points, group.log_ms, group.extra_variance, group.cells, group.slice_count, POPULATION).best.theta
    slope, floor = math.exp(theta[0]), math.exp(theta[0] + theta[1])
    assert floor == pytest.approx(8.0, rel=0.05)
    assert slope == pytest.approx(0.4, rel=0.12)
    assert theta[4] == pytest.approx(1.0, abs=0.06)
    assert theta[5] == pytest.approx(0.6, abs=0.2)
    assert math.exp(theta[6]) == pytest.approx(4.0, rel=0.4)


def test_intervals_hold_for_about_nine_in_ten():
    inside = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        truth = Truth(
            floor_ms=float(rng.uniform(2, 12)),
            work_ms=float(rng.uniform(0.2, 1)),
            bound_by_memory=float(rng.uniform(0.1, 0.6)),
        )
        questions, answers = _asked(measured(truth, noise=0.03, seed=seed), ("1g.10gb", "3g.40gb"))
        found = predict_group(make_group(questions))
        inside += [found[n].low_ms <= answer <= found[n].high_ms for n, answer in answers.items()]
        assert all(one.low_ms < one.latency_ms < one.high_ms for one in found)
    assert np.mean(inside) >= 0.88


def test_less_knowledge_means_wider_intervals():
    def width(known):
        questions, answers = _asked(measured(Truth()), tuple(set(SHARES) - set(known)))
        found = predict(questions)
        return np.mean(
            [math.log(found[n].high_ms / found[n].low_ms) for n in answers if questions[n].profile == "3g.40gb"]
        )

    assert width(("7g.80gb", "1g.10gb", "4g.40gb")) < width(("7g.80gb",))


def test_processes_and_sequences_are_dimensions():
    rows = measured(Truth(), batches=(1, 4, 16, 64), sequences=(32, 128), processes=(1, 3))
    assert _errors(rows, ("3g.40gb", "4g.40gb", "1g.10gb")).mean() < 0.06


def test_batches_that_nobody_measured():
    rows = measured(Truth())
    questions = [
        dataclasses.replace(r, latency_ms=None) if r.batch in (8, 256) or r.profile == "3g.40gb" else r for r in rows
    ]
    found = predict(questions)
    errors = [
        abs(found[n].latency_ms / row.latency_ms - 1) for n, row in enumerate(rows) if questions[n].latency_ms is None
    ]
    assert np.mean(errors) < 0.08


def test_a_stale_row_does_not_spoil_the_rest():
    rows = measured(Truth(), noise=0.005)
    bad = next(n for n, row in enumerate(rows) if row.profile == "2g.20gb" and row.batch == 16)
    rows[bad] = dataclasses.replace(rows[bad], latency_ms=rows[bad].latency_ms * 3)
    questions, answers = _asked(rows, ("1g.10gb", "3g.40gb", "4g.40gb"))
    found = predict(questions)
    elsewhere = [abs(found[n].latency_ms / answer - 1) for n, answer in answers.items() if rows[n].batch != 16]
    assert np.mean(elsewhere) < 0.06


def test_one_known_row_gives_wide_but_ordered_predictions():
    known = Measurement("H100-80GB", "train", "new", "7g.80gb", 8, latency_ms=20.0)
    asked = [
        Measurement("H100-80GB", "train", "new", name, 8)
        for name in ("full", "4g.40gb", "3g.40gb", "2g.20gb", "1g.20gb", "1g.10gb")
    ]
    found = predict([known, *asked])
    latencies = [one.latency_ms for one in found[1:]]
    assert latencies == sorted(latencies)
    assert found[0].latency_ms == pytest.approx(20, rel=0.05)
    assert found[-1].low_ms < 40 < 150 < found[-1].high_ms
    assert found[-1].latency_ms <= 20 * 8.3  # no slice has less than an eighth of anything


def test_other_workloads_lend_experience_but_never_latencies():
    tested, _ = _asked(measured(Truth()), ("1g.10gb", "2g.20gb", "3g.40gb", "4g.40gb"))
    alone = predict(tested)
    others = [
        row for n in range(6) for row in measured(Truth(floor_ms=3 + n, work_ms=0.2 + 0.1 * n), name=f"other-{n}")
    ]
    beside = predict([*tested, *others])[: len(tested)]
    assert [a.latency_ms for a in alone] != [b.latency_ms for b in beside]
    assert max(abs(math.log(a.latency_ms / b.latency_ms)) for a, b in zip(alone, beside, strict=True)) < 0.3
    # A slower twin of another name changes the prior's shapes, not this workload's scale.
    twin = [dataclasses.replace(row, workload="twin", latency_ms=1000 * row.latency_ms) for row in measured(Truth())]
    scaled = predict([*tested, *twin])[: len(tested)]
    assert max(abs(math.log(a.latency_ms / b.latency_ms)) for a, b in zip(alone, scaled, strict=True)) < 0.3


def test_order_of_rows_does_not_matter():
    questions, _ = _asked(measured(Truth(), noise=0.02), ("1g.10gb", "3g.40gb"))
    shuffled = np.random.default_rng(1).permutation(len(questions))
    straight, other = predict(questions), predict([questions[n] for n in shuffled])
    for place, number in enumerate(shuffled):
        assert other[place].latency_ms == pytest.approx(straight[number].latency_ms, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"latency_ms": -1.0}, "latency_ms must be a finite number"),
        ({"latency_ms": math.nan}, "latency_ms must be a finite number"),
        ({"latency_ms": 0.0}, "latency_ms is 0"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"processes": 0}, "processes must be at least 1"),
        ({"gpu": "Z9"}, "Z9"),
        ({"profile": "9g.1gb"}, "no profile"),
        ({"fb_mib": math.inf}, "fb_mib must be"),
    ],
)
def test_rows_that_cannot_be(change, sentence):
    row = Measurement("A100-80GB", "infer", "net", "7g.80gb", 1, latency_ms=5.0)
    with pytest.raises(PredictionError, match=sentence):
        predict([dataclasses.replace(row, **change)])


def test_nothing_known_is_said():
    rows = [Measurement("A100-80GB", "infer", "net", "7g.80gb", batch) for batch in BATCHES]
    with pytest.raises(PredictionError, match="Nothing is known of 'net'"):
        predict(rows)


def test_no_rows_no_predictions():
    assert predict([]) == []
