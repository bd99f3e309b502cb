"""The covering problem against enumeration, and the bound against the optimum: whatever the prices, it is never above."""

from __future__ import annotations

import itertools
import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.mig.planner.bound import best_prices, cover, guessed_prices, price_bound
from actors.mig.planner.cover import cheapest_cover
from tests.actors.mig.planner.problems import exhaustive_fewest_gpus, problem_of, small_problem


@settings(max_examples=80)
@given(
    need=st.integers(1, 40),
    kinds=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 15)), min_size=1, max_size=4),
)
def test_the_cheapest_cover_is_the_cheapest(need, kinds):
    sizes = {number: size for number, (size, _) in enumerate(kinds)}
    prices = {number: price for number, (_, price) in enumerate(kinds)}
    cost, counts = cheapest_cover(need, sizes, prices)
    assert sum(sizes[kind] * count for kind, count in counts.items()) >= need
    assert sum(prices[kind] * count for kind, count in counts.items()) == cost
    ranges = [range(-(-need // size) + 1) for size in sizes.values()]
    best = min(
        sum(prices[kind] * count for kind, count in enumerate(choice))
        for choice in itertools.product(*ranges)
        if sum(sizes[kind] * count for kind, count in enumerate(choice)) >= need
    )
    assert cost == best


def test_no_prices_prove_more_than_the_optimum():
    rng = random.Random(0)
    for seed in range(6):
        problem = small_problem(random.Random(seed))
        optimum = exhaustive_fewest_gpus(problem, 4)
        for _ in range(20):
            prices = {kind: rng.randrange(0, 10**9) for kind in problem.slices}
            assert price_bound(problem, prices).gpus <= optimum
        bounds = best_prices(problem, deadline=time.monotonic() + 5)
        assert bounds[0].gpus <= optimum
        assert bounds[0].value >= max(price_bound(problem, prices).value for prices in guessed_prices(problem))


def test_a_bound_is_what_its_prices_say_by_hand():
    """One net, 10 requests/s on 1g and 60 on 7g, demand 95: at 1/7 a slice ten 1g cost 10/7: two GPUs."""
    problem = problem_of({"net": (95.0, {"1g.10gb": 10.0, "7g.80gb": 60.0})})
    prices = {("A100-80GB", "1g.10gb"): 10**9 // 7, ("A100-80GB", "7g.80gb"): 10**9}
    bound = price_bound(problem, prices)
    assert cover(problem.loads[0], prices)[1] == {("A100-80GB", "1g.10gb"): 10}
    assert abs(float(bound.value) - 10 / 7) < 1e-6
    assert bound.gpus == 2
