"""Real trainers on the group: DDP resumed bit for bit, DeepSpeed ZeRO equal to gloo, both recorded."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from actors.c4.recorder.backend import recorder
from actors.c4.recorder.reader import RingReader
from actors.c4.recorder.records import OpFlag, OpType
from tests.actors.c4.recorder.ranks import run_ranks


def recorded() -> list[tuple[str, str, bool]]:
    """Group, type and whether the ring ran it, of every operation of this process."""
    current = recorder()
    assert current is not None
    assert current.path is not None
    with RingReader(current.path) as reader:
        seen = reader.read()
    return [
        (seen.communicators[one["communicator"]].name, OpType(one["op_type"]).name, bool(one["flags"] & OpFlag.RING))
        for one in seen.operations
    ]


def resume_ddp(rank: int, size: int) -> dict[str, Any]:
    """Six steps; then the last three again from the state after three, by a new DDP, whose first step has other buckets."""

    def start(state: Any = None) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layers = [nn.Linear(40, 40) for _ in range(6)]
        net = nn.Sequential(*layers[:3], nn.Tanh(), *layers[3:])
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        if state is not None:
            net.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        return nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.02), optimizer

    def train(model: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            batch = torch.randn(16, 40, generator=torch.Generator().manual_seed(100 * step + rank))
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

    model, optimizer = start()
    train(model, optimizer, range(3))
    state = copy.deepcopy((model.module.state_dict(), optimizer.state_dict()))
    before = len(recorded())
    train(model, optimizer, range(3, 6))
    steady = len(recorded()) - before
    again, other = start(state)
    before = len(recorded())
    train(again, other, range(3, 4))
    first = len(recorded()) - before
    train(again, other, range(4, 6))
    same = all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    return {"same": same, "steady": steady / 3, "first": first, "records": recorded()}


def test_a_resumed_ddp_run_is_the_unbroken_one_to_the_bit(tmp_path: Path) -> None:
    ended = run_ranks(4, resume_ddp, tmp_path)
    assert [one.error for one in ended] == [None] * 4
    for one in ended:
        assert one.value["first"] != one.value["steady"]  # the buckets did differ, so the order of addition could have
        assert one.value["same"]
        assert one.value["records"] == ended[0].value["records"]
        assert {(kind, ring) for _, kind, ring in one.value["records"]} >= {("ALL_REDUCE", True), ("BROADCAST", True)}


def train_zero(rank: int, size: int, backend: str) -> dict[str, Any]:
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # DeepSpeed looks for ninja there
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    import deepspeed

    deepspeed.init_distributed(backend)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    engine, _, _, _ = deepspeed.initialize(
        model=net, optimizer=torch.optim.AdamW(net.parameters(), lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1, "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3}, "steps_per_print": 1000,
        },
    )  # fmt: skip
    losses = []
    for step in range(4):
        batch = torch.randn(8, 32, generator=torch.Generator().manual_seed(step * 10 + rank))
        loss = engine(batch).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return {"losses": losses, "records": recorded() if backend == "c4" else []}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_deepspeed_zero_3_trains_as_on_gloo_and_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    # A folder of its own: in the user's cache a process that was killed while compiling leaves a lock that all wait for.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    ours = run_ranks(2, train_zero, tmp_path, "c4", limit_s=250)
    theirs = run_ranks(2, train_zero, tmp_path, "gloo", limit_s=250, backend="gloo")
    assert [one.error for one in [*ours, *theirs]] == [None] * 4
    for one, other in zip(ours, theirs, strict=True):
        assert one.value["losses"] == other.value["losses"]  # of two ranks a sum has one order
        assert one.value["losses"][-1] < one.value["losses"][0]
        assert {(kind, ring) for _, kind, ring in one.value["records"]} >= {
            ("ALL_GATHER", True),
            ("REDUCE_SCATTER", True),
        }
