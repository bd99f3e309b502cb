"""The law against the formula in plain floats, and its derivatives against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.mig.prediction.law import COUNT, log_latency, make_points
from actors.mig.prediction.slices import parse_slice
from tests.actors.mig.prediction.synthetic import SHARES, Truth

GPU = "A100-80GB"


def _points():
    rows = [
        (b, s, p, parse_slice(GPU, name)) for b in (1, 8, 64) for s in (None, 128) for p in (1, 3) for name in SHARES
    ]
    return rows, *make_points(rows)


@pytest.mark.parametrize("truth", [Truth(), Truth(host_ms=1.5, sharpness=1), Truth(floor_ms=0.5, bound_by_memory=0.9)])
def test_law_is_the_formula(truth):
    rows, points, cells, slices = _points()
    slope = truth.work_ms + truth.host_ms
    theta = np.array([
        math.log(slope), math.log(truth.floor_ms / slope), math.log(max(truth.host_ms, 1e-12) / truth.work_ms),
        math.log(truth.weights), 1.0, truth.bound_by_memory, math.log(truth.sharpness), 1.1, 0.0,
    ])  # fmt: skip
    value, _ = log_latency(theta, np.zeros(len(cells)), np.zeros(len(slices)), points)
    expected = [truth.latency_ms(batch, part.profile, sequence, processes) for batch, sequence, processes, part in rows]
    np.testing.assert_allclose(np.exp(value), expected, rtol=1e-9)


@settings(max_examples=25)
@given(st.lists(st.floats(-1.5, 1.5), min_size=COUNT, max_size=COUNT), st.integers(0, 2**31))
def test_derivatives_are_those_of_the_value(theta, seed):
    _, points, cells, slices = _points()
    size = len(cells)
    x = np.concatenate([theta, 0.2 * np.random.default_rng(seed).normal(size=size + len(slices))])

    def value(at):
        return log_latency(at[:COUNT], at[COUNT : COUNT + size], at[COUNT + size :], points)

    _, slope = value(x)
    for column in range(len(x)):
        step = np.zeros(len(x))
        step[column] = 1e-6
        numeric = (value(x + step)[0] - value(x - step)[0]) / 2e-6
        np.testing.assert_allclose(slope[:, column], numeric, atol=1e-6)


def test_same_shares_are_one_slice_and_same_batch_one_cell():
    a, b = parse_slice(GPU, "1g.10gb"), parse_slice(GPU, "1g.10gb+me")
    points, cells, slices = make_points([(4, None, 1, a), (4, None, 1, b), (4, 64, 1, a), (8, None, 1, a)])
    assert points.slice_index.tolist() == [0, 0, 0, 0]
    assert len(slices) == 1
    assert points.cell.tolist() == [0, 0, 0, 1]
    assert cells.shape == (2, 3)
