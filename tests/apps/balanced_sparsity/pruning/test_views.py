"""Views: every kind of module's weight as a matrix whose product is the module's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from apps.balanced_sparsity.pruning.views import prunable


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.lstm = nn.LSTM(8, 8, 2, bidirectional=True, proj_size=4)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.LayerNorm(8)
        self.twice = nn.ModuleList([nn.Linear(8, 8)] * 2)
        self.gru = nn.GRU(8, 4)


def test_gates_are_found_embeddings_and_what_is_tied_to_them_are_not():
    found = prunable(Tied())
    gates = [
        f"lstm.weight_{kind}_l{layer}{way}" for layer in (0, 1) for way in ("", "_reverse") for kind in ("ih", "hh")
    ]
    assert [weight.name for weight in found] == [*gates, "twice.0.weight", "gru.weight_ih_l0", "gru.weight_hh_l0"]
    assert (found[0].rows, found[0].columns) == (32, 8)
    assert (found[1].rows, found[1].columns) == (32, 4)


def test_skip_names_modules_and_parameters():
    names = [weight.name for weight in prunable(Tied(), skip=("lstm", "gru.weight_hh_l0"))]
    assert names == ["twice.0.weight", "gru.weight_ih_l0"]
    with pytest.raises(ValueError, match="no lstn to skip"):
        prunable(Tied(), skip=("lstn",))
    assert [w.name for w in prunable(nn.ModuleDict({"a": nn.Linear(2, 2), "ab": nn.Linear(2, 2)}), skip=("a",))] == [
        "ab.weight"
    ]


def test_a_convolution_is_a_matrix_over_unfolded_patches():
    conv = nn.Conv2d(3, 5, (3, 2), padding=1)
    [weight] = prunable(conv)
    x = torch.randn(2, 3, 6, 7)
    patches = F.unfold(x, (3, 2), padding=1)
    product = (weight.matrix() @ patches).view(2, 5, 6, 8) + conv.bias[:, None, None]
    torch.testing.assert_close(product, conv(x))
    assert (weight.name, weight.rows, weight.columns) == ("weight", 5, 18)


def test_write_goes_into_the_weight():
    conv = nn.Conv1d(4, 6, 3, groups=2)
    [weight] = prunable(conv)
    matrix = torch.arange(36.0).view(6, 6)
    weight.write(matrix)
    assert torch.equal(conv.weight.flatten(1), matrix)
    assert torch.equal(weight.matrix(), matrix)
