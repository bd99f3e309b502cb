"""What a training loop meets when a peer dies or calls something else: an error that names it, soon, and a record of it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from actors.c4.recorder.backend import recorder
from actors.c4.recorder.errors import MismatchError
from actors.c4.recorder.reader import RingReader
from actors.c4.recorder.records import OpFlag
from tests.actors.c4.recorder.ranks import run_ranks


def lose_a_peer_in_ddp(rank: int, size: int) -> tuple[str, float]:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    for step in range(5):
        if (rank, step) == (size - 1, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        try:
            model(torch.randn(8, 64)).square().mean().backward()
        except RuntimeError as error:
            return str(error), time.monotonic() - began
    return "nothing happened", 0.0


def test_a_killed_peer_raises_in_backward_and_is_named(tmp_path: Path) -> None:
    *survivors, dead = run_ranks(3, lose_a_peer_in_ddp, tmp_path)
    assert (dead.value, dead.error) == (None, None)
    for ended in survivors:
        assert ended.error is None
        text, seconds = ended.value
        assert "rank 2 is gone" in text
        assert seconds < 30  # the timeout is 60


def call_another_operation(rank: int, size: int) -> dict[str, object]:
    dist.all_reduce(torch.ones(10))
    found: dict[str, object] = {}
    began = time.monotonic()
    try:
        if rank == 1:
            dist.broadcast(torch.ones(10), 0)
        else:
            dist.all_reduce(torch.ones(10))
    except MismatchError as error:
        found["text"] = str(error)
    found["seconds"] = time.monotonic() - began
    try:
        dist.all_reduce(torch.ones(10), async_op=True).wait()
    except MismatchError as error:
        found["then"] = str(error)
    current = recorder()
    assert current is not None
    assert current.path is not None
    with RingReader(current.path) as reader:
        found["flags"] = [int(flags) for flags in reader.read().operations["flags"]]
    return found


def test_another_operation_is_told_by_all_and_recorded(tmp_path: Path) -> None:
    ended = run_ranks(3, call_another_operation, tmp_path)
    assert [one.error for one in ended] == [None] * 3
    for one in ended:
        assert "all_reduce (sum) #2" in one.value["text"]
        assert "broadcast #2" in one.value["text"]
        assert "rank 1" in one.value["text"]
        assert one.value["then"] == one.value["text"]  # the group stays broken, for the same reason
        assert one.value["seconds"] < 30
        good, bad, refused = one.value["flags"]
        assert not good & OpFlag.FAILED
        assert bad & OpFlag.FAILED
        assert bad & OpFlag.MISMATCH
        assert refused & OpFlag.FAILED
