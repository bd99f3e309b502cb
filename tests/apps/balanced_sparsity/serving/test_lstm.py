"""The served LSTM: every stream is nn.LSTM on its own frames, whatever the others do; wrong requests change nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from apps.balanced_sparsity.pruning.packing import pack_
from apps.balanced_sparsity.pruning.patterns import Pattern
from apps.balanced_sparsity.pruning.schedule import GradualSchedule
from apps.balanced_sparsity.pruning.sparsifier import Sparsifier
from apps.balanced_sparsity.serving.lstm import LstmServer, StreamError, StreamStatus


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(40, 64, 3, batch_first=True)
        self.head = nn.Linear(64, 10)


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    dense = Net()
    sparsifier = Sparsifier(Pattern.balanced(32), GradualSchedule(0, 0.75, 0, 0), skip=("head",))
    sparsifier.prepare(dense)
    sparsifier.squash()
    packed = copy.deepcopy(dense)
    pack_(packed)
    return dense.eval(), packed


@pytest.mark.parametrize("which", [0, 1])
def test_interleaved_streams_equal_the_whole_sequences(nets, which):
    dense, served = nets[0], nets[which]
    server = LstmServer(served.lstm, served.head)
    sequences = {"a": torch.randn(9, 40), "b": torch.randn(5, 40), "c": torch.randn(7, 40)}
    outputs = {name: [] for name in sequences}
    for name in sequences:
        server.open(name)
    for step in range(9):
        for name, frames in sequences.items():
            if step < len(frames):
                outputs[name].append(server.step(name, frames[step]))
    for name, frames in sequences.items():
        with torch.no_grad():
            expected = dense.head(dense.lstm(frames[None])[0][0])
        torch.testing.assert_close(torch.stack(outputs[name]), expected, atol=1e-5, rtol=0)
        assert server.close(name) == StreamStatus(len(frames), 2 * 3 * 64 * 4)
    assert server.open_streams == 0


def test_the_stream_unused_for_longest_makes_room_and_is_refused(nets):
    server = LstmServer(nets[1].lstm, max_streams=2)
    server.open("a")
    server.open("b")
    server.step("a", torch.zeros(40))
    server.open("c")
    assert server.open_streams == 2
    with pytest.raises(StreamError, match="'b' is not open"):
        server.step("b", torch.zeros(40))
    assert server.status("a").frames == 1


def test_a_wrong_frame_changes_nothing(nets):
    server, clean = LstmServer(nets[1].lstm), LstmServer(nets[1].lstm)
    frames = torch.randn(2, 40)
    for one in (server, clean):
        one.open("a")
        one.step("a", frames[0])
    for wrong in (
        torch.zeros(41),
        torch.zeros(1, 40),
        torch.zeros(40, dtype=torch.int64),
        torch.full((40,), float("nan")),
    ):
        with pytest.raises(StreamError):
            server.step("a", wrong)
    assert torch.equal(server.step("a", frames[1]), clean.step("a", frames[1]))
    with pytest.raises(StreamError, match="open already"):
        server.open("a")


def test_what_cannot_be_served():
    with pytest.raises(ValueError, match="bidirectional"):
        LstmServer(nn.LSTM(4, 4, bidirectional=True))
    with pytest.raises(ValueError, match="max_streams"):
        LstmServer(nn.LSTM(4, 4), max_streams=0)
