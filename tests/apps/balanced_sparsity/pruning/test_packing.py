"""A packed model computes what the pruned one does, is as small as its pattern says, and survives the disk bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from apps.balanced_sparsity.pruning.packed_modules import BalancedConv, BalancedLSTM
from apps.balanced_sparsity.pruning.packing import PackingError, load_packed, pack_, save_packed
from apps.balanced_sparsity.pruning.patterns import Pattern
from apps.balanced_sparsity.pruning.prune import balanced
from apps.balanced_sparsity.pruning.schedule import GradualSchedule
from apps.balanced_sparsity.pruning.sparsifier import Sparsifier
from kernels.balanced import BalancedFormatError, BalancedLinear


def pruned(model, pattern="balanced:16", sparsity=0.75, skip=()):
    sparsifier = Sparsifier(Pattern.parse(pattern), GradualSchedule(0, sparsity, 0, 0), skip)
    sparsifier.prepare(model)
    sparsifier.squash()
    return model.eval()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.conv = nn.Conv1d(16, 32, 3, padding=1)
        self.norm = nn.BatchNorm1d(32)
        self.lstm = nn.LSTM(32, 24, 2, batch_first=True)
        self.first = nn.Linear(24, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words):
        x = self.norm(self.conv(self.embedding(words).transpose(1, 2))).transpose(1, 2)
        return self.head(self.first(self.lstm(x)[0]))


@pytest.mark.parametrize(("value_type", "tolerance"), [("fp32", 1e-6), ("fp16", 2e-3), ("bf16", 2e-2), ("int8", 2e-2)])
def test_a_packed_model_computes_the_same_and_is_smaller(value_type, tolerance):
    model = pruned(Net())
    words = torch.randint(0, 50, (3, 7))
    with torch.no_grad():
        expected = model(words)
        report = pack_(model, value_type, block=16)
        got = model(words)
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()
    assert isinstance(model.conv, BalancedConv)
    assert isinstance(model.lstm, BalancedLSTM)
    assert isinstance(model.first, BalancedLinear)
    assert isinstance(model.head, nn.Linear)  # tied to the embedding
    assert [(layer.k, layer.why) for layer in report.layers] == [(4, "")] * 6
    value_bytes = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}[value_type]
    kept = sum(layer.rows * layer.columns // 4 for layer in report.layers if layer.columns % 16 == 0)
    assert sum(layer.packed_bytes for layer in report.layers) >= kept * value_bytes
    assert report.packed_bytes < report.dense_bytes
    assert (
        report.dense_bytes == sum(p.nbytes for p in (*Net().parameters(), *Net().buffers())) + 50 * 16 * 4
    )  # tied: twice


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 32, 3, padding=1),
        nn.Conv2d(8, 32, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(0, 1)),
        nn.Conv2d(16, 32, 1),
        nn.Conv2d(16, 32, 1, stride=2, bias=False),
        nn.Conv2d(8, 32, 3, padding="same", padding_mode="reflect"),
        nn.Conv1d(8, 32, 5, stride=2, padding=2),
        nn.Conv1d(16, 32, 1),
    ],
    ids=str,
)
def test_convolutions(conv):
    model = pruned(nn.Sequential(conv), "balanced:8", 0.5)
    shape = (2, conv.in_channels, 9, 10)[: 3 if isinstance(conv, nn.Conv1d) else 4]
    x = torch.randn(shape)
    with torch.no_grad():
        expected, alone = model(x), model(x[0])
        pack_(model, block=8)
        assert isinstance(model[0], BalancedConv)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x[0]), alone)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_layers": 2},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"proj_size": 8, "num_layers": 2},
        {"bias": False},
    ],
    ids=str,
)
def test_lstms(kwargs):
    torch.manual_seed(1)
    model = pruned(nn.ModuleDict({"lstm": nn.LSTM(16, 24, **kwargs)}), "balanced:8", 0.5)
    dense = copy.deepcopy(model["lstm"])
    pack_(model, block=8)
    packed = model["lstm"]
    x = torch.randn(5, 3, 16)
    with torch.no_grad():
        y, (h, c) = dense(x)
        for given, want in (
            (packed(x), (y, (h, c))),
            (packed(x, (h, c) if not dense.batch_first else None), dense(x, (h, c) if not dense.batch_first else None)),
        ):
            torch.testing.assert_close(given[0], want[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(given[1], want[1], atol=1e-5, rtol=0)
        torch.testing.assert_close(packed(x[:, 0]), dense(x[:, 0]), atol=1e-5, rtol=0)
        if dense.bidirectional:
            with pytest.raises(ValueError, match="bidirectional"):
                packed.step(x[0])
            return
        state, steps = None, []
        for frame in x:
            out, state = packed.step(frame, state)
            steps.append(out)
    torch.testing.assert_close(torch.stack(steps), y, atol=1e-5, rtol=0)
    torch.testing.assert_close(state, (h, c), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="16 features"):
        packed(torch.randn(5, 3, 17))
    with pytest.raises(ValueError, match="state must be"):
        packed(x, (h[:, :1], c))


def test_what_is_not_balanced_stays_dense_and_says_why():
    model = nn.Sequential(nn.Linear(64, 32), nn.Conv1d(32, 32, 3, groups=4), nn.GRU(32, 32))
    pruned(model, "unstructured", 0.5)
    report = pack_(model, block=16)
    assert isinstance(model[0], nn.Linear)
    assert [layer.k for layer in report.layers] == [0, 0]
    assert "16" in report.layers[0].why
    assert "groups" in report.layers[1].why
    assert report.packed_bytes == report.dense_bytes


def test_vectors_of_rows_share_an_index():
    plain, shared = (pruned(nn.Sequential(nn.Linear(64, 32)), p, 0.75) for p in ("balanced:16", "balanced:16x8"))
    x = torch.randn(2, 64)
    with torch.no_grad():
        expected = shared(x)
        big, small = pack_(plain, block=16), pack_(shared, block=16, vector=8)
        torch.testing.assert_close(shared(x), expected)
    assert small.layers[0].k == big.layers[0].k == 4


@pytest.mark.parametrize("value_type", ["fp32", "bf16", "int8"])
def test_the_disk_keeps_every_bit(tmp_path, value_type):
    model = pruned(Net())
    pack_(model, value_type, block=16)
    save_packed(model, tmp_path / "model.safetensors")
    again = load_packed(Net(), tmp_path / "model.safetensors").eval()
    words = torch.randint(0, 50, (2, 5))
    with torch.no_grad():
        assert torch.equal(again(words), model(words))
    assert again.head.weight is again.embedding.weight


def test_files_that_do_not_fit(tmp_path):
    path = tmp_path / "model.safetensors"
    model = pruned(nn.Sequential(nn.Linear(32, 16)))
    pack_(model, block=16)
    save_packed(model, path)
    with pytest.raises(PackingError, match="another model"):
        load_packed(Net(), path)
    with pytest.raises(PackingError, match="in the model"):
        load_packed(nn.Sequential(nn.Linear(64, 16)), path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(BalancedFormatError):
        load_packed(nn.Sequential(nn.Linear(32, 16)), path)
    with pytest.raises(BalancedFormatError, match="no file"):
        load_packed(nn.Sequential(nn.Linear(32, 16)), tmp_path / "none")


def test_mistakes():
    with pytest.raises(PackingError, match="contains it"):
        pack_(nn.Linear(8, 8))
    model = nn.Sequential(balanced(nn.Linear(16, 16), "weight", 8, 0.5))
    with pytest.raises(PackingError, match="masks are still attached"):
        pack_(model)
    prune.remove(model[0], "weight")
    assert pack_(model, block=8).layers[0].k == 4
    with pytest.raises(PackingError, match="one of fp32"):
        pack_(nn.Sequential(), "fp64")
