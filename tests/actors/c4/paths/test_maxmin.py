"""Max-min fairness against progressive filling in exact fractions, and against the definition."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.c4.paths.errors import PathError
from actors.c4.paths.maxmin import load_matrix, max_min


def progressive_filling(paths: list[list[tuple[int, int]]], capacity: list[int], limits: list[int]) -> list[Fraction]:
    """Raises all rates together until a link or a limit stops some; the textbook's algorithm, one event at a time."""
    rates = [Fraction(0)] * len(paths)
    growing = set(range(len(paths)))
    left = [Fraction(c) for c in capacity]
    while growing:
        steps = [Fraction(limits[e]) - rates[e] for e in growing]
        for link in range(len(capacity)):
            weight = sum(w for e in growing for at, w in paths[e] if at == link)
            if weight:
                steps.append(left[link] / weight)
        step = min(steps)
        for e in growing:
            rates[e] += step
            for link, weight in paths[e]:
                left[link] -= step * weight
        full = {link for link in range(len(capacity)) if left[link] == 0}
        growing = {e for e in growing if rates[e] < limits[e] and not any(link in full and w for link, w in paths[e])}
    return rates


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[list[tuple[int, int]]], list[int], list[int]]:
    links = draw(st.integers(1, 6))
    entities = draw(st.integers(1, 9))
    paths = [
        sorted(draw(st.dictionaries(st.integers(0, links - 1), st.integers(1, 4), min_size=0, max_size=4)).items())
        for _ in range(entities)
    ]
    capacity = draw(st.lists(st.integers(0, 30), min_size=links, max_size=links))
    limits = draw(st.lists(st.integers(1, 20), min_size=entities, max_size=entities))
    return paths, capacity, limits


def matrix_of(paths: list[list[tuple[int, int]]], links: int):
    rows = [(e, link, weight) for e, path in enumerate(paths) for link, weight in path]
    entity = np.array([row[0] for row in rows], np.int64)
    hop = np.array([[row[1]] for row in rows], np.int64).reshape(-1, 1)
    weight = np.array([row[2] for row in rows], float)
    return load_matrix(entity, weight, hop, len(paths), links)


@given(networks())
def test_equals_progressive_filling_in_exact_fractions(network):
    paths, capacity, limits = network
    found = max_min(matrix_of(paths, len(capacity)), np.array(capacity, float), np.array(limits, float))
    wanted = progressive_filling(paths, capacity, limits)
    np.testing.assert_allclose(found, [float(rate) for rate in wanted], rtol=1e-9, atol=1e-9)


def test_hand_worked():
    """Two flows share a link of 10; one of them also crosses a link of 3: it gets 3, the other 7 (Bertsekas and Gallager)."""
    load = load_matrix(np.array([0, 1]), np.ones(2), np.array([[0, 1], [0, -1]]), 2, 2)
    np.testing.assert_allclose(max_min(load, np.array([10.0, 3.0])), [3.0, 7.0])


def test_large_random_network_meets_the_definition():
    """Every flow has a bottleneck: a full link on which nobody is faster (the theorem that characterises max-min)."""
    rng = np.random.default_rng(0)
    links = rng.integers(0, 400, (3000, 5))
    load = load_matrix(np.arange(3000), rng.uniform(0.1, 1.0, 3000), links, 3000, 400)
    capacity = rng.uniform(1, 100, 400)
    rates = max_min(load, capacity)
    used = load.T @ rates
    assert (used <= capacity * (1 + 1e-9)).all()
    full = used >= capacity * (1 - 1e-9)
    fastest = np.array([rates[links[:, 0:5].__eq__(link).any(1)].max(initial=0) for link in range(400)])
    for flow in range(3000):
        assert any(full[link] and rates[flow] >= fastest[link] * (1 - 1e-9) for link in links[flow])


def test_a_flow_that_nothing_limits_is_an_error():
    with pytest.raises(PathError, match="neither a link nor a limit"):
        max_min(load_matrix(np.array([0]), np.ones(1), np.array([[-1]]), 1, 1), np.ones(1))
