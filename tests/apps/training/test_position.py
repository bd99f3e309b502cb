"""The position in the data follows from the step: whole epochs, the same global batch for any number of workers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apps.training.position import batch_indices, mix, place_of, share_of, steps_per_epoch


@given(examples=st.integers(1, 60), batch=st.integers(1, 60), seed=st.integers(0, 5))
def test_an_epoch_sees_an_example_at_most_once_and_all_that_fill_whole_batches(examples, batch, seed):
    if batch > examples:
        with pytest.raises(ValueError, match="cannot be drawn"):
            steps_per_epoch(examples, batch)
        return
    steps = examples // batch
    seen = torch.cat([batch_indices(step, examples, batch, seed) for step in range(steps)])
    assert len(set(seen.tolist())) == len(seen) == steps * batch
    assert 0 <= int(seen.min()) <= int(seen.max()) < examples


def test_workers_share_the_global_batch_out():
    whole = batch_indices(7, 100, 24, seed=3)
    shares = [batch_indices(7, 100, 24, seed=3, rank=rank, world_size=3) for rank in range(3)]
    assert torch.equal(torch.cat(shares), whole)
    with pytest.raises(ValueError, match="cannot be divided"):
        share_of(25, 3)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(batch_indices(step, 50, 50, seed).tolist()) for step in (0, 1, 2) for seed in (0, 1)}
    assert len(orders) == 6
    assert place_of(7, 50, 20).epoch == 3 and place_of(7, 50, 20).batch == 1


def test_mixed_seeds_are_valid_for_torch_and_do_not_collide_for_neighbours():
    values = {mix(a, b) for a in range(50) for b in range(50)}
    assert len(values) == 2500 and all(0 <= value < 2**63 for value in values)
