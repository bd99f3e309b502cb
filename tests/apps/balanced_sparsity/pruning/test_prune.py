"""``BalancedPruning`` behaves as torch's own pruning methods do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from apps.balanced_sparsity.pruning.patterns import Pattern, mask_of
from apps.balanced_sparsity.pruning.prune import BalancedPruning, balanced


def test_mask_original_and_removal():
    linear = nn.Linear(64, 10)
    before = linear.weight.detach().clone()
    assert balanced(linear, "weight", 16, 0.75) is linear
    assert {name for name, _ in linear.named_parameters()} == {"weight_orig", "bias"}
    assert torch.equal(linear.weight_mask.bool(), mask_of(before.abs(), Pattern.balanced(16), 0.75))
    assert torch.equal(linear.weight_orig, before)
    assert torch.equal(linear.weight, before * linear.weight_mask)
    assert prune.is_pruned(linear)
    linear(torch.randn(3, 64)).sum().backward()
    assert torch.equal(linear.weight_orig.grad == 0, linear.weight_mask == 0)
    pruned = linear.weight.detach().clone()
    prune.remove(linear, "weight")
    assert not prune.is_pruned(linear)
    assert torch.equal(linear.weight, pruned)
    assert {name for name, _ in linear.named_parameters()} == {"weight", "bias"}


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
def test_an_lstm_computes_with_what_is_left(name):
    lstm = nn.LSTM(32, 16)
    twin = nn.LSTM(32, 16)
    twin.load_state_dict(lstm.state_dict())
    balanced(lstm, name, 8, 0.5)
    with torch.no_grad():
        getattr(twin, name).mul_(getattr(lstm, f"{name}_mask"))
    x = torch.randn(5, 2, 32)
    torch.testing.assert_close(lstm(x)[0], twin(x)[0])
    lstm(x)[0].sum().backward()
    twin(x)[0].sum().backward()
    mask = getattr(lstm, f"{name}_mask")
    torch.testing.assert_close(getattr(lstm, f"{name}_orig").grad, getattr(twin, name).grad * mask)
    prune.remove(lstm, name)
    torch.testing.assert_close(lstm(x)[0], twin(x)[0])


def test_a_second_pruning_keeps_out_what_the_first_dropped():
    conv = nn.Conv2d(8, 4, 3)
    balanced(conv, "weight", 8, 0.5)
    first = conv.weight_mask.clone()
    balanced(conv, "weight", 8, 0.75)
    assert ((conv.weight_mask == 1) <= (first == 1)).all()
    assert (conv.weight_mask.flatten(1).view(4, 9, 8).sum(2) == 2).all()


def test_scores_and_state_dict():
    linear = nn.Linear(16, 2)
    scores = torch.arange(32.0).view(2, 16)
    balanced(linear, "weight", 8, 0.75, importance_scores=scores)
    assert linear.weight_mask[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1] * 2
    other = nn.Linear(16, 2)
    balanced(other, "weight", 8, 0.75)
    other.load_state_dict(linear.state_dict())
    x = torch.randn(1, 16)
    assert torch.equal(other(x), linear(x))


def test_mistakes():
    with pytest.raises(ValueError, match="4 to 256"):
        balanced(nn.Linear(8, 8), "weight", 2, 0.5)
    with pytest.raises(ValueError):
        BalancedPruning(8, 0.99)
    with pytest.raises(AttributeError):
        balanced(nn.Linear(8, 8), "wait", 8, 0.5)
