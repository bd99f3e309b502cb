"""One-shot pruning: Wanda by its formula, SparseGPT against a dense OBS solve, reconstruction against least squares."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from apps.balanced_sparsity.pruning.calibration import InputStatistics, observed
from apps.balanced_sparsity.pruning.one_shot import DAMPING, one_shot_, pruned_matrix, reconstructed, sparsegpt
from apps.balanced_sparsity.pruning.patterns import Pattern, mask_of
from apps.balanced_sparsity.pruning.views import prunable

PATTERNS = ["balanced:8", "balanced:8x2", "unstructured", "block:4x4", "2:4"]


def inputs(samples=200, columns=32, seed=0):
    """Correlated, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    return (torch.randn(samples, columns, generator=generator) @ mix) * torch.logspace(-1, 1, columns)


def hessian_of(x):
    return x.T @ x


def error(weight, pruned, x):
    return float(((weight - pruned) @ x.T).square().sum())


def obs_by_brute_force(matrix, hessian, pattern, sparsity, width):
    """Left to right in float64: for each dropped entry the OBS update over all columns left, H inverted anew each time."""
    weight = matrix.double().clone()
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(
        len(hessian), dtype=torch.float64
    )
    mask = torch.ones_like(matrix, dtype=torch.bool)
    for column in range(weight.shape[1]):
        if column % width == 0:
            block = range(column, min(column + width, weight.shape[1]))
            # Of the inverse of what is left when column j's turn comes.
            inverse = torch.stack([torch.linalg.inv(damped[j:, j:])[0, 0] for j in block])
            mask[:, block.start : block.stop] = mask_of(
                weight[:, block.start : block.stop].square() / inverse, pattern, sparsity
            )
        rest = torch.linalg.inv(damped[column:, column:])
        dropped = weight[:, column] * ~mask[:, column]
        weight[:, column:] -= (dropped / rest[0, 0])[:, None] * rest[0][None, :]
    return weight, mask


@pytest.mark.parametrize(
    ("pattern", "width"), [("balanced:8", 8), ("2:4", 4), ("unstructured", 128), ("balanced:16x2", 16)]
)
def test_sparsegpt_is_obs_column_by_column(pattern, width):
    pattern = Pattern.parse(pattern)
    x = inputs(columns=48)
    matrix = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))
    expected, mask = obs_by_brute_force(matrix, hessian_of(x), pattern, 0.5, width)
    got, got_mask = sparsegpt(matrix, hessian_of(x), pattern, 0.5)
    assert torch.equal(got_mask, mask)
    torch.testing.assert_close(got.double(), expected.masked_fill(~mask, 0.0), rtol=2e-3, atol=2e-3)


def test_windows_do_not_change_the_updates():
    """More columns than are updated together: the lazy update reaches those of later windows."""
    x = inputs(samples=600, columns=272)
    matrix = torch.randn(4, 272, generator=torch.Generator().manual_seed(1))
    expected, mask = obs_by_brute_force(matrix, hessian_of(x), Pattern.balanced(16), 0.75, 16)
    got, got_mask = sparsegpt(matrix, hessian_of(x), Pattern.balanced(16), 0.75)
    assert (got_mask == mask).float().mean() > 0.995  # scores that differ by rounding
    assert error(matrix, got, x) == pytest.approx(error(matrix, (expected * mask).float(), x), rel=0.02)


def test_wanda_is_magnitude_times_norm_of_the_inputs():
    x, matrix = inputs(), torch.randn(8, 32)
    statistics = InputStatistics(torch.zeros(1, 32, 32))
    statistics.add(x[None, :150])
    statistics.add(x[None, 150:])
    pruned, mask = pruned_matrix(matrix, Pattern.balanced(8), 0.5, "wanda", statistics)
    scores = matrix.abs() * x.norm(dim=0)
    kept = scores.view(8, 4, 8).topk(4).indices
    assert torch.equal(mask, torch.zeros(8, 4, 8, dtype=bool).scatter_(2, kept, True).view(8, 32))
    assert torch.equal(pruned, matrix * mask)


def test_reconstruction_is_the_least_squares_optimum():
    x, matrix = inputs(), torch.randn(5, 32)
    mask = mask_of(matrix.abs(), Pattern.unstructured(), 0.6)  # rows that keep different numbers
    statistics = InputStatistics(torch.zeros(1, 32, 32))
    statistics.add(x[None])
    got = reconstructed(matrix, mask, statistics)
    assert not got[~mask].any()
    damping = DAMPING * float(statistics.hessian[0].diagonal().mean())
    for row, kept, result in zip(matrix, mask, got, strict=True):
        # Ridge towards the dense weight, as one least-squares problem.
        left = torch.cat((x, damping**0.5 * torch.eye(32))).double()
        best = torch.linalg.lstsq(left[:, kept], left @ row.double()).solution
        torch.testing.assert_close(result[kept].double(), best, rtol=1e-3, atol=1e-3)


def test_reconstruction_fits_other_inputs_to_the_dense_outputs():
    x = inputs()
    seen = x + 0.3 * x.std(0) * torch.randn_like(x)
    matrix = torch.randn(4, 32)
    mask = mask_of(matrix.abs(), Pattern.balanced(8), 0.5)
    statistics = InputStatistics(torch.zeros(1, 32, 32))
    statistics.add(seen[None])
    plain, fitted = reconstructed(matrix, mask, statistics), reconstructed(matrix, mask, statistics, (seen.T @ x)[None])

    def off(weight):
        return float((seen @ weight.T - x @ matrix.T).square().sum())

    assert off(fitted) < off(plain)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_better_methods_lose_less(pattern):
    x, matrix = inputs(), torch.randn(16, 32, generator=torch.Generator().manual_seed(2))
    statistics = InputStatistics(torch.zeros(1, 32, 32))
    statistics.add(x[None])
    done = {
        m: pruned_matrix(matrix, Pattern.parse(pattern), 0.5, m, statistics)
        for m in ("magnitude", "wanda", "sparsegpt")
    }
    losses = {method: error(matrix, pruned, x) for method, (pruned, _) in done.items()}
    losses["reconstructed"] = error(matrix, reconstructed(matrix, done["sparsegpt"][1], statistics), x)
    assert losses["reconstructed"] < losses["sparsegpt"] < losses["wanda"] < losses["magnitude"]
    for pruned, mask in done.values():
        assert float(mask.float().mean()) == pytest.approx(0.5)
        assert not pruned[~mask].any()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 16, 3, padding=1, groups=2)
        self.lstm = nn.LSTM(16, 8, 2, bidirectional=True)
        self.gru = nn.GRU(16, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x, scale=1.0):
        y = self.lstm(self.conv(x * scale).permute(2, 0, 1))[0]
        return self.head(self.gru(y.transpose(0, 1))[0])


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_kind_of_layer(method):
    model = Net()
    batches = [torch.randn(3, 8, 10) for _ in range(3)]
    masks = one_shot_(model, Pattern.balanced(4), 0.5, method, batches, skip=("head",))
    assert set(masks) == {weight.name for weight in prunable(model, ("head",))}
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        assert parameter.shape == mask.shape
        assert torch.equal(parameter != 0, mask)
        assert (mask.flatten(1).view(len(mask), -1, 4).sum(2) == 2).all()
    assert model.head.weight.all()
    assert not any(module._forward_hooks for module in model.modules())


def test_observed_inputs_are_those_of_the_products():
    """Each weight times its observed inputs gives the module's own pre-activations, gates of both directions included."""
    torch.manual_seed(0)
    lstm = nn.LSTM(6, 4, 2, bidirectional=True, batch_first=True)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    seen: dict[str, torch.Tensor] = {}

    class Keep(InputStatistics):
        pass

    weights = prunable(nn.ModuleDict({"lstm": lstm, "conv": conv}))
    x, image = torch.randn(3, 7, 6), torch.randn(2, 4, 9, 9)
    with observed(weights) as statistics:
        for name, found in statistics.items():
            found.add = lambda inputs, name=name: seen.update({name: inputs})  # type: ignore[method-assign]
        y, _ = lstm(x)
        z = conv(image)
    products = torch.einsum("gsc,grc->grs", seen["conv.weight"], conv.weight.flatten(1).view(2, 3, 18)).reshape(
        6, 2, 25
    )
    torch.testing.assert_close(products.permute(1, 0, 2).reshape(2, 6, 5, 5) + conv.bias[:, None, None], z)
    # The last layer's second direction, rebuilt from its observed inputs alone.
    names = ("weight_ih_l1_reverse", "weight_hh_l1_reverse", "bias_ih_l1_reverse", "bias_hh_l1_reverse")
    w_ih, w_hh, b_ih, b_hh = (getattr(lstm, name) for name in names)
    gates = seen["lstm." + names[0]][0] @ w_ih.T + seen["lstm." + names[1]][0] @ w_hh.T + b_ih + b_hh
    i, f, g, o = gates.view(7, 3, 16).chunk(4, dim=2)
    c, outputs = torch.zeros(3, 4), []
    for t in range(7):
        c = f[t].sigmoid() * c + i[t].sigmoid() * g[t].tanh()
        outputs.append(o[t].sigmoid() * c.tanh())
    torch.testing.assert_close(torch.stack(outputs).flip(0).transpose(0, 1), y[:, :, 4:])


def test_a_state_is_the_first_input_of_the_recurrence():
    lstm = nn.LSTM(6, 4)
    h = torch.full((1, 2, 4), 3.0)
    with observed(prunable(lstm)) as statistics:
        lstm(torch.randn(1, 2, 6), (h, torch.zeros(1, 2, 4)))
    torch.testing.assert_close(statistics["weight_hh_l0"].hessian, torch.full((1, 4, 4), 18.0))


def test_forward_decides_how_a_batch_is_run():
    torch.manual_seed(0)
    x, model = torch.randn(2, 8, 5), Net()

    def pruned(batch, **how):
        net = copy.deepcopy(model)
        one_shot_(net, Pattern.balanced(4), 0.5, "wanda", [batch], **how)
        return torch.cat([weight.flatten() for weight in net.parameters()])

    plain, scaled = pruned(x), pruned(2.0 * x)
    assert torch.equal(pruned({"x": x}, forward=lambda m, b: m(b["x"])), plain)
    assert torch.equal(pruned((x, 2.0)), scaled)
    assert not torch.equal(plain, scaled)
    assert (plain == 0).float().mean() > 0.3


def test_inputs_that_are_dead_are_pruned_first_and_harmless():
    linear = nn.Sequential(nn.Linear(16, 4, bias=False))
    with torch.no_grad():
        linear[0].weight.sign_()  # of one size: only the inputs decide
    x = torch.randn(50, 16)
    x[:, ::2] = 0
    expected = linear(x)
    one_shot_(linear, Pattern.balanced(8), 0.5, "sparsegpt", [x])
    torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-4)
    one_shot_(linear, Pattern.balanced(8), 0.5, "sparsegpt", [torch.zeros(3, 16)])
    assert linear[0].weight.isfinite().all()


def test_mistakes():
    linear = nn.Sequential(nn.Linear(16, 4))
    with pytest.raises(ValueError, match="no calibration batch reached 0.weight"):
        one_shot_(linear, Pattern.balanced(8), 0.5, "wanda")
    with pytest.raises(ValueError, match="one of magnitude, wanda, sparsegpt"):
        one_shot_(linear, Pattern.balanced(8), 0.5, "random")
    with pytest.raises(ValueError, match="finite"):
        one_shot_(linear, Pattern.balanced(8), 0.5, "sparsegpt", [torch.full((3, 16), float("nan"))])
    packed, lstm = nn.utils.rnn.pack_sequence([torch.randn(3, 6)]), nn.ModuleList([nn.LSTM(6, 4)])
    with pytest.raises(TypeError, match="padded"):
        one_shot_(lstm, Pattern.balanced(4), 0.5, "wanda", [packed], forward=lambda m, b: m[0](b))
    assert F.linear(torch.zeros(1, 16), linear[0].weight).isfinite().all()
