"""A worker's tiers without Ray: what is where after which report, and what a failing tier costs."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest
import torch

from actors.c4.recovery import disk
from actors.c4.recovery.keeper import Keeper
from actors.c4.recovery.memory import REPORTS, STATES
from actors.c4.recovery.parts import PartId, Version, whole_versions
from actors.c4.recovery.randomness import random_states, set_random_states
from actors.c4.recovery.settings import CheckpointSettings
from actors.c4.recovery.step_state import StepState
from actors.c4.recovery.tiers import CheckpointTiers, WorkerPlan, set_tiers

LOCAL = pafs.LocalFileSystem()


def plan(memory: Path, rank: int = 0, world_size: int = 1, **more: Any) -> WorkerPlan:
    settings = more.pop("settings", None) or CheckpointSettings(memory_dir=str(memory))
    more = {"generation": 1, "node_id": f"node{rank}", **more}
    return WorkerPlan(run="run", rank=rank, world_size=world_size, settings=settings, **more)


class Peers:
    """Keepers of nodes, and what a worker does to reach one: delivered when waited for, as over a network."""

    def __init__(self, memory: Path, nodes: int):
        self.keepers = {f"node{node}": Keeper("run", str(memory), f"node{node}") for node in range(nodes)}
        self.waited = 0

    def tiers(self, memory: Path, rank: int, world_size: int, **more: Any) -> CheckpointTiers:
        peer = self.keepers[f"node{(rank + 1) % world_size}"]

        def wait(call: Any, timeout_s: float) -> bool:
            self.waited += 1
            return bool(peer.put(*call))

        return CheckpointTiers(plan(memory, rank, world_size, **more), lambda *call: call, wait)

    def choices(self, channel: str, but: str = "") -> list[Any]:
        inventories = {}
        for node, keeper in self.keepers.items():
            if node != but:
                found = keeper.inventory()
                inventories[node] = found.reports if channel == REPORTS else found.states
        return whole_versions(inventories)


def test_a_step_counts_when_all_ranks_have_stored_it(tmp_path: Path) -> None:
    peers = Peers(tmp_path, 2)
    first, second = (peers.tiers(tmp_path, rank, 2) for rank in range(2))
    first.store_report(1, {"model": b"one"}, {})
    second.store_report(1, {}, {})
    first.store_report(2, {"model": b"two"}, {})
    [newest] = peers.choices(REPORTS)
    assert newest.version == Version(1, 1)
    second.store_report(2, {}, {})
    assert peers.choices(REPORTS)[0].version == Version(1, 2)


@pytest.mark.parametrize("lost", ["node0", "node1"])
def test_a_lost_node_costs_at_most_the_newest_step(tmp_path: Path, lost: str) -> None:
    peers = Peers(tmp_path, 2)
    ranks = [peers.tiers(tmp_path, rank, 2) for rank in range(2)]
    for number in range(1, 6):
        for rank, tiers in enumerate(ranks):
            tiers.store_state(number, f"{rank}:{number}".encode())
    # The copies of step 5 are still on their way; step 4's must have arrived before step 5 was stored.
    assert peers.choices(STATES, but=lost)[0].version == Version(1, 4)
    for tiers in ranks:
        assert tiers.wait_for_peer(STATES)
    assert peers.choices(STATES, but=lost)[0].version == Version(1, 5)


def test_waiting_for_the_peer_loses_nothing(tmp_path: Path) -> None:
    settings = CheckpointSettings(memory_dir=str(tmp_path), wait_for_peer=True)
    peers = Peers(tmp_path, 2)
    for rank in range(2):
        peers.tiers(tmp_path, rank, 2, settings=settings).store_state(1, b"x")
    assert peers.choices(STATES, but="node1")[0].version == Version(1, 1)


def test_a_keeper_merges_the_ranks_files_and_skips_a_damaged_copy(tmp_path: Path) -> None:
    peers = Peers(tmp_path, 2)
    ranks = [peers.tiers(tmp_path, rank, 2) for rank in range(2)]
    ranks[0].store_report(1, {"model.pt": b"weights", "shards/0": b"a"}, {"random": b"r0"})
    ranks[1].store_report(1, {"shards/1": b"b"}, {"random": b"r1"})
    for tiers in ranks:
        tiers.wait_for_peer(REPORTS)
    keeper = peers.keepers["node0"]
    path = keeper.folders[REPORTS].path(PartId(Version(1, 1), 1, 2))
    choice = peers.choices(REPORTS)[0]
    assert choice.holders == (("node0", "node1"), ("node0", "node1"))
    restored = keeper.assemble(REPORTS, choice, (0, 1), {})
    files = {
        file.relative_to(restored.folder).as_posix(): file.read_bytes()
        for file in Path(restored.folder).rglob("*")
        if file.is_file()
    }
    assert files == {"model.pt": b"weights", "shards/0": b"a", "shards/1": b"b"}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RuntimeError, match="No copy of the part of rank 1"):
        keeper.assemble(REPORTS, choice, (0, 1), {})


def test_a_peer_refuses_a_damaged_part_and_one_under_a_false_name(tmp_path: Path) -> None:
    keeper = Keeper("run", str(tmp_path), "node0")
    assert not keeper.put(STATES, PartId(Version(1, 1), 0, 1), b"not a part")
    tiers = CheckpointTiers(plan(tmp_path / "other"))
    tiers.store_state(1, b"x")
    data = tiers._folders[STATES].read(PartId(Version(1, 1), 0, 1))
    assert not keeper.put(STATES, PartId(Version(1, 2), 0, 1), data)
    assert keeper.put(STATES, PartId(Version(1, 1), 0, 1), data)


def test_disk_follows_its_interval_and_always_gets_the_last(tmp_path: Path) -> None:
    tiers = CheckpointTiers(plan(tmp_path / "memory"))
    for number in range(1, 4):
        tiers.store_report(number, {"model": str(number).encode()}, {})
        tiers.target(LOCAL, str(tmp_path / f"c{number}"))
        if tiers.disk_is_due():
            tiers.flush()
    assert tiers.finish()
    assert [number for number in range(1, 4) if disk.exists(LOCAL, str(tmp_path / f"c{number}"))] == [1, 3]
    assert disk.is_whole(LOCAL, str(tmp_path / "c3"))


def test_a_full_disk_is_a_warning_and_the_next_one_is_tried(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    settings = CheckpointSettings(memory_dir=str(tmp_path / "memory"), disk_interval_s=0.0)
    tiers = CheckpointTiers(plan(tmp_path, settings=settings))
    real = disk.write_part

    def full(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "write_part", full)
    tiers.store_report(1, {"model": b"1"}, {})
    tiers.target(LOCAL, str(tmp_path / "c1"))
    with caplog.at_level(logging.WARNING):
        tiers.flush()
        tiers._flush and tiers._flush.result()
    assert "No space left" in caplog.text
    assert "Training goes on" in caplog.text
    assert not disk.is_whole(LOCAL, str(tmp_path / "c1"))
    monkeypatch.setattr(disk, "write_part", real)
    tiers.store_report(2, {"model": b"2"}, {})
    tiers.target(LOCAL, str(tmp_path / "c2"))
    assert tiers.disk_is_due()
    tiers.flush()
    assert tiers.finish()
    assert disk.is_whole(LOCAL, str(tmp_path / "c2"))


def test_a_full_memory_is_a_warning_and_the_older_version_stays(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    tiers = CheckpointTiers(plan(tmp_path))
    assert tiers.store_state(1, b"1")
    monkeypatch.setattr(
        "actors.c4.recovery.memory._write_all", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with caplog.at_level(logging.WARNING):
        assert not tiers.store_state(2, b"2")
    assert "No space left" in caplog.text
    assert [part.version for part in tiers._folders[STATES].inventory()] == [Version(1, 1)]


def make() -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def train(model: Any, optimizer: Any, scheduler: Any, first: int, last: int, state: StepState | None) -> list[float]:
    losses = []
    for step in range(first, last):
        inputs = torch.from_numpy(np.random.randn(4, 6).astype(np.float32)) * (1 + random.random())  # noqa: NPY002
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if state is not None:
            state.commit(step, losses=list(losses))
    return losses


def test_step_state_resumes_bit_by_bit_with_dropout_scheduler_and_three_generators(tmp_path: Path) -> None:
    try:
        np.random.seed(1), random.seed(2)  # noqa: NPY002
        unbroken = train(*make(), 0, 10, None)

        np.random.seed(1), random.seed(2)  # noqa: NPY002
        set_tiers(CheckpointTiers(plan(tmp_path)))
        model, optimizer, scheduler = make()
        train(model, optimizer, scheduler, 0, 6, StepState(model=model, optimizer=optimizer, scheduler=scheduler))

        np.random.seed(77), random.seed(77)  # noqa: NPY002 - a new process starts anywhere
        keeper = Keeper("run", str(tmp_path), "node0")
        choice = whole_versions({"node0": keeper.inventory().states})[0]
        [(_, path)] = keeper.assemble(STATES, choice, (0,), {}).parts
        set_tiers(CheckpointTiers(plan(tmp_path, generation=2, state_part=path, state_world_size=1)))
        model, optimizer, scheduler = make()
        state = StepState(model=model, optimizer=optimizer, scheduler=scheduler)
        first = state.restore() + 1
        assert first == 6
        assert state.restored["losses"] == unbroken[:6]
        assert train(model, optimizer, scheduler, first, 10, state) == unbroken[6:]
    finally:
        set_tiers(None)


def test_outside_a_trainer_step_state_does_nothing() -> None:
    state = StepState(model=torch.nn.Linear(1, 1))
    assert not state.commit(0)
    assert state.restore() == -1
    with pytest.raises(TypeError, match="has no state_dict"):
        StepState(model=3)  # type: ignore[arg-type]


def test_random_states_come_back() -> None:
    states = random_states()
    drawn = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())  # noqa: NPY002
    set_random_states(states)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == drawn  # noqa: NPY002
