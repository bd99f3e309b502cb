"""The sparsifier: pruned stays pruned, sparsity rises as scheduled, a resumed run is the unbroken one, nothing is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from apps.balanced_sparsity.pruning.patterns import Pattern, mask_of
from apps.balanced_sparsity.pruning.schedule import GradualSchedule
from apps.balanced_sparsity.pruning.sparsifier import Sparsifier
from apps.balanced_sparsity.pruning.views import prunable

PATTERNS = ["balanced:8", "unstructured", "block:4x4", "2:4"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv1d(4, 8, 4)
        self.lstm = nn.LSTM(8, 16, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.lstm(self.conv(x).permute(2, 0, 1))[0][-1])


def train_step(model, optimizer, sparsifier, step):
    x = torch.randn(6, 4, 9, generator=torch.Generator().manual_seed(step))
    loss = nn.functional.cross_entropy(model(x), torch.arange(6) % 3)
    optimizer.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    sparsifier.step()
    return gradients


def new(pattern="balanced:8", final=0.5, **kwargs):
    return Sparsifier(Pattern.parse(pattern), GradualSchedule(0.0, final, 2, 10, 4, "linear"), **kwargs)


def zeros(parameter):
    return float((parameter == 0).float().mean())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_pruned_weights_and_gradients_stay_zero_while_training(pattern, optimizer):
    model = Net()
    sparsifier = new(pattern)
    sparsifier.prepare(model)
    kwargs = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    opt = optimizer(model.parameters(), lr=0.05, **kwargs)
    before = {name: torch.zeros_like(mask) for name, mask in sparsifier.masks().items()}
    for step in range(14):
        was = sparsifier.masks()
        gradients = train_step(model, opt, sparsifier, step)
        for name, mask in sparsifier.masks().items():
            parameter = model.get_parameter(name)
            assert not parameter[~mask].any()
            assert not gradients[name][~was[name]].any()
            assert not (mask & before[name]).any()  # what was pruned never comes back
            before[name] |= ~mask
    for weight in prunable(model):
        assert zeros(weight.parameter) == pytest.approx(0.5)
        assert sparsifier.sparsity()[weight.name] == pytest.approx(0.5)
    assert sparsifier.overall_sparsity() == pytest.approx(0.5)


def test_the_threshold_is_within_the_block_and_rises_as_scheduled():
    model = nn.Linear(64, 8)
    sparsifier = Sparsifier(Pattern.balanced(16), GradualSchedule(0.25, 0.75, 1, 3, 1, "linear"))
    sparsifier.prepare(model)
    dense = model.weight.detach().clone()
    kept = []
    for _ in range(4):
        sparsifier.step()
        kept.append(int(sparsifier.masks()["weight"].view(8, 4, 16).sum(2).unique()))
    assert kept == [12, 8, 4, 4]
    # Nothing trained in between: gradual is then the same as at once.
    assert torch.equal(sparsifier.masks()["weight"], mask_of(dense.abs(), Pattern.balanced(16), 0.75))


def test_one_shot_at_prepare():
    model = Net()
    sparsifier = Sparsifier(Pattern.balanced(8), GradualSchedule(0.0, 0.5, 0, 0), skip=("head",))
    sparsifier.prepare(model)
    assert zeros(model.lstm.weight_hh_l1) == 0.5
    assert zeros(model.head.weight) == 0
    assert "head.weight" not in sparsifier.sparsity()


def test_resumed_is_the_unbroken_run():
    straight, halves = Net(), Net()

    def run(model, sparsifier, opt, steps):
        for step in steps:
            train_step(model, opt, sparsifier, step)

    sparsifier = new()
    sparsifier.prepare(straight)
    run(straight, sparsifier, torch.optim.SGD(straight.parameters(), lr=0.1), range(14))

    first = new()
    first.prepare(halves)
    run(halves, first, torch.optim.SGD(halves.parameters(), lr=0.1), range(5))
    state, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(halves.state_dict())
    resumed, second = Net(), new()
    second.prepare(resumed)
    resumed.load_state_dict(weights)
    second.load_state_dict(state)
    run(resumed, second, torch.optim.SGD(resumed.parameters(), lr=0.1), range(5, 14))
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    assert all(torch.equal(mask, second.masks()[name]) for name, mask in sparsifier.masks().items())


def test_squash_leaves_an_ordinary_model():
    model = Net()
    names = set(model.state_dict())
    sparsifier = Sparsifier(Pattern.balanced(8), GradualSchedule(0.0, 0.5, 0, 0))
    sparsifier.prepare(model)
    sparsifier.squash()
    assert set(model.state_dict()) == names
    assert not any(p._backward_hooks for p in model.parameters())
    assert zeros(model.lstm.weight_ih_l0) == 0.5
    model(torch.randn(2, 4, 9)).sum().backward()
    assert model.lstm.weight_ih_l0.grad[model.lstm.weight_ih_l0 == 0].any()  # gradients are masked no more
    with pytest.raises(ValueError, match="prepare"):
        sparsifier.step()


def test_a_replaced_parameter_is_followed():
    model = nn.Linear(16, 2)
    sparsifier = Sparsifier(Pattern.balanced(8), GradualSchedule(0.0, 0.5, 0, 0))
    sparsifier.prepare(model)
    model.weight = nn.Parameter(torch.ones(2, 16))
    sparsifier.step()
    assert zeros(model.weight) == 0.5
    model(torch.ones(1, 16)).sum().backward()
    assert int((model.weight.grad == 0).sum()) == 16


def test_broken_weights_do_not_vanish_and_pruned_ones_are_zero():
    model = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, float("nan"), float("inf"), 2, 0, 0, 3, -float("inf")]]))
    sparsifier = Sparsifier(Pattern.balanced(8), GradualSchedule(0.0, 0.75, 0, 0))
    sparsifier.prepare(model)
    assert sparsifier.masks()["weight"][0].nonzero()[:, 0].tolist() == [1, 2]
    assert model.weight[0, [0, 3, 4, 5, 6, 7]].tolist() == [0] * 6


def test_mistakes_are_sentences():
    with pytest.raises(ValueError, match="at most 0.5 sparse"):
        Sparsifier(Pattern.two_four(), GradualSchedule(0, 0.75, 0, 1))
    with pytest.raises(ValueError, match="no weight that can be pruned"):
        new().prepare(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="prepare"):
        new().sparsity()
    model, sparsifier = Net(), new()
    sparsifier.prepare(model)
    with pytest.raises(ValueError, match="has a model already"):
        sparsifier.prepare(model)
    other = new("unstructured")
    other.prepare(Net())
    with pytest.raises(ValueError, match="pattern"):
        other.load_state_dict(sparsifier.state_dict())
    other = new(skip=("head",))
    other.prepare(Net())
    with pytest.raises(ValueError, match=r"another model.*head.weight"):
        other.load_state_dict(sparsifier.state_dict())


def test_agrees_with_torchs_own_sparsifier_at_2_4():
    """torch.ao's WeightNormSparsifier zeroes 2 of every 1 x 4 block at level 1.0, too."""
    from torch.ao.pruning import WeightNormSparsifier

    model = nn.Sequential(nn.Linear(64, 16, bias=False))
    theirs = copy.deepcopy(model)
    reference = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    reference.prepare(theirs, [{"tensor_fqn": "0.weight"}])
    reference.step()
    reference.squash_mask()
    sparsifier = Sparsifier(Pattern.two_four(), GradualSchedule(0.0, 0.5, 0, 0))
    sparsifier.prepare(model)
    sparsifier.squash()
    assert torch.equal(model[0].weight, theirs[0].weight)
