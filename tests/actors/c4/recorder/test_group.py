"""The process group: every operation gives gloo's result and leaves its record. One job of four ranks serves all checks."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from actors.c4.recorder.backend import recorder
from actors.c4.recorder.group import role_of
from actors.c4.recorder.layout import parse_name
from actors.c4.recorder.reader import RingReader
from actors.c4.recorder.records import ElementType, OpFlag, OpType
from tests.actors.c4.recorder.ranks import Ended, run_ranks

SIZE = 4
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
]
COUNTS = (0, 1, 3, 1000, 20_001)  # nothing, fewer than ranks, odd, one piece, several pieces that do not divide


@functools.cache
def drawn(count: int, rank: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(rank + 7 * count), dtype=torch.float64) * 10


def values(count: int, dtype: torch.dtype, rank: int) -> torch.Tensor:
    made = drawn(count, rank)
    return made.to(dtype, copy=True) if dtype.is_floating_point else made.abs().to(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def in_rank_order(count: int, dtype: torch.dtype, size: int) -> torch.Tensor:
    """The oracle: ((r0 + r1) + r2) + r3, rounded to the dtype after each addition."""
    total = values(count, dtype, 0)
    for rank in range(1, size):
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        total = (total.to(wide) + values(count, dtype, rank).to(wide)).to(dtype)
    return total


def check_all(rank: int, size: int) -> dict[str, Any]:
    """Runs at every rank; the findings go back to the tests."""
    gloo = dist.new_group(backend="gloo")
    found: dict[str, Any] = {"sums": [], "others": {}, "errors": []}
    for dtype in DTYPES:
        for count in COUNTS:
            ours, theirs = values(count, dtype, rank), values(count, dtype, rank)
            dist.all_reduce(ours)
            dist.all_reduce(theirs, group=gloo)
            scale = max(1.0, theirs.double().abs().max().item() if count else 1.0)
            off = (ours.double() - theirs.double()).abs().max().item() / scale if count else 0.0
            found["sums"].append((str(dtype), count, bits(ours) == bits(in_rank_order(count, dtype, size)), off))
    found["others"] = {name: same(op, gloo) for name, op in OPERATIONS.items()}
    # The same elements in other buckets, by themselves, and run again: the same bits.
    whole, again = values(50_000, torch.float32, rank), values(50_000, torch.float32, rank)
    dist.all_reduce(whole)
    dist.all_reduce(again)
    parts = [part.clone() for part in values(50_000, torch.float32, rank).split([1, 16_383, 3_616, 30_000])]
    for work in [dist.all_reduce(part, async_op=True) for part in parts]:
        work.wait()
    found["layouts"] = (bits(whole) == bits(again), bits(whole) == bits(torch.cat(parts)))
    # A change while asynchronous operations of two groups are under way.
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = pairs[rank // 2]
    found["outside"] = pairs[1 - rank // 2] is dist.GroupMember.NON_GROUP_MEMBER
    one, two = torch.full((70_000,), float(rank)), torch.full((5,), float(rank))
    works = [dist.all_reduce(one, async_op=True), dist.all_reduce(two, group=mine, async_op=True)]
    futures = [work.get_future() for work in works]
    found["async"] = (
        futures[0].wait()[0][0].item(),
        futures[1].wait()[0][0].item(),
        [work.is_completed() for work in works],
    )
    alone = dist.new_group([rank], use_local_synchronization=True)
    lonely = torch.ones(3)
    dist.all_reduce(lonely, group=alone)
    dist.barrier(group=alone)
    found["alone"] = lonely.tolist()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for axis in ("dp", "tp"):
        dist.all_reduce(torch.ones(2), group=mesh.get_group(axis))
    dist.all_reduce(torch.ones(4, 4).t())  # not contiguous: by gloo
    dist.all_reduce(values(10, torch.float32, rank), op=dist.ReduceOp.MAX)
    abandoned = dist.all_reduce(torch.ones(4), op=dist.ReduceOp.MIN, async_op=True)
    dist.barrier()
    time.sleep(0.3)  # the heartbeat closes what nobody waits for
    current = recorder()
    assert current is not None
    assert current.path is not None
    path = current.path
    del abandoned
    dist.destroy_process_group()
    dist.init_process_group("c4", init_method=f"file://{path.parent}/again", rank=rank, world_size=size)
    once_more = torch.ones(1)
    dist.all_reduce(once_more)
    found["again"] = once_more.item()
    found["ring"] = str(path)
    return found


def same(operation: Callable[[Any], list[torch.Tensor]], gloo: Any) -> Any:
    """Largest difference from gloo, or the error's text."""
    try:
        ours, theirs = operation(None), operation(gloo)
        return max(
            ((a.double() - b.double()).abs().max().item() for a, b in zip(ours, theirs, strict=True)), default=0.0
        )
    except Exception as error:
        return repr(error)


def _all_gather(group: Any) -> list[torch.Tensor]:
    parts = [torch.empty(3, 2) for _ in range(SIZE)]
    dist.all_gather(parts, torch.full((3, 2), float(dist.get_rank())), group=group)
    return parts


def _all_gather_single(group: Any) -> list[torch.Tensor]:
    out = torch.empty(5 * SIZE, dtype=torch.int64)
    dist.all_gather_single(out, torch.arange(5) * dist.get_rank(), group=group)
    return [out]


def _reduce_scatter(group: Any) -> list[torch.Tensor]:
    out = torch.empty(4)
    dist.reduce_scatter(
        out, [values(4, torch.float32, dist.get_rank() * 10 + part) for part in range(SIZE)], group=group
    )
    return [out]


def _reduce_scatter_single(group: Any) -> list[torch.Tensor]:
    out, given = torch.empty(30_000), values(30_000 * SIZE, torch.float32, dist.get_rank())
    kept = given.clone()
    dist.reduce_scatter_single(out, given, group=group)
    return [out, given - kept]


def _broadcast(group: Any) -> list[torch.Tensor]:
    out = values(9, torch.float64, dist.get_rank())
    dist.broadcast(out, 2, group=group)
    return [out]


def _reduce(group: Any) -> list[torch.Tensor]:
    out = values(9, torch.float32, dist.get_rank())
    dist.reduce(out, 1, group=group)
    return [out] if dist.get_rank() == 1 else []


def _gather(group: Any) -> list[torch.Tensor]:
    parts = [torch.empty(2) for _ in range(SIZE)] if dist.get_rank() == 3 else None
    dist.gather(torch.full((2,), float(dist.get_rank())), parts, 3, group=group)
    return parts or []


def _scatter(group: Any) -> list[torch.Tensor]:
    out = torch.empty(2)
    dist.scatter(
        out, [torch.full((2,), float(i)) for i in range(SIZE)] if dist.get_rank() == 0 else None, 0, group=group
    )
    return [out]


def _all_to_all(group: Any) -> list[torch.Tensor]:
    out = torch.empty(SIZE)
    dist.all_to_all_single(out, torch.arange(SIZE, dtype=torch.float32) + 10 * dist.get_rank(), group=group)
    return [out]


def _objects(group: Any) -> list[torch.Tensor]:
    gathered: list[Any] = [None] * SIZE
    dist.all_gather_object(gathered, {"rank": dist.get_rank()}, group=group)
    sent = [dist.get_rank()]
    dist.broadcast_object_list(sent, 1, group=group)
    return [torch.tensor([one["rank"] for one in gathered] + sent)]


def _point_to_point(group: Any) -> list[torch.Tensor]:
    rank = dist.get_rank()
    got = torch.empty(3)
    ops = [
        dist.P2POp(dist.isend, torch.full((3,), float(rank)), (rank + 1) % SIZE, group),
        dist.P2POp(dist.irecv, got, (rank - 1) % SIZE, group),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    any_one = torch.empty(1)
    if rank == 0:
        dist.send(torch.tensor([7.0]), 1, group=group)
    if rank == 1:
        dist.recv(any_one, None, group=group)
        return [got, any_one]
    return [got]


def _functional(group: Any) -> list[torch.Tensor]:
    import torch.distributed._functional_collectives as functional

    group = group or dist.group.WORLD
    mine = values(8, torch.float32, dist.get_rank())
    gathered = functional.all_gather_into_tensor_coalesced([mine, mine[:3].clone()], group)
    return [
        functional.all_reduce(mine, "sum", group) + 0,
        functional.all_gather_tensor(mine, 0, group) + 0,
        functional.reduce_scatter_tensor(mine, "sum", 0, group) + 0,
        *(one + 0 for one in gathered),
    ]


def _maximum(group: Any) -> list[torch.Tensor]:
    out = values(9, torch.float32, dist.get_rank())
    dist.all_reduce(out, op=dist.ReduceOp.MAX, group=group)
    return [out]


OPERATIONS: dict[str, Callable[[Any], list[torch.Tensor]]] = {
    "all_gather": _all_gather, "all_gather_single": _all_gather_single, "reduce_scatter": _reduce_scatter,
    "reduce_scatter_single": _reduce_scatter_single, "broadcast": _broadcast, "reduce": _reduce, "gather": _gather,
    "scatter": _scatter, "all_to_all_single": _all_to_all, "objects": _objects, "point to point": _point_to_point,
    "functional": _functional, "maximum": _maximum,
}  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[Ended]:
    return run_ranks(SIZE, check_all, tmp_path_factory.mktemp("rings"), options={"piece_bytes": 1 << 14})


@pytest.fixture(scope="module")
def found(job: list[Ended]) -> list[dict[str, Any]]:
    assert [ended.error for ended in job] == [None] * SIZE
    return [ended.value for ended in job]


def test_sums_are_the_oracles_to_the_bit_and_gloos_within_rounding(found: list[dict[str, Any]]) -> None:
    tolerance = {"torch.float16": 2e-3, "torch.bfloat16": 2e-2, "torch.float32": 1e-6, "torch.float64": 1e-14}
    for rank in found:
        assert len(rank["sums"]) == len(DTYPES) * len(COUNTS)
        for dtype, count, exact, off in rank["sums"]:
            assert exact, (dtype, count)
            assert off <= tolerance.get(dtype, 0.0), (dtype, count, off)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_result_is_gloos(found: list[dict[str, Any]], name: str) -> None:
    limit = 1e-5 if name in ("reduce_scatter", "reduce_scatter_single", "functional", "reduce") else 0.0
    assert all(isinstance(rank["others"][name], float) and rank["others"][name] <= limit for rank in found), [
        rank["others"][name] for rank in found
    ]


def test_bits_depend_neither_on_the_run_nor_on_the_layout_of_buckets(found: list[dict[str, Any]]) -> None:
    assert [rank["layouts"] for rank in found] == [(True, True)] * SIZE


def test_asynchronous_operations_of_two_groups(found: list[dict[str, Any]]) -> None:
    assert [rank["async"] for rank in found] == [(6.0, float(1 if at < 2 else 5), [True, True]) for at in range(SIZE)]
    assert all(rank["outside"] for rank in found)


def test_a_group_of_one_rank(found: list[dict[str, Any]]) -> None:
    assert all(rank["alone"] == [1.0] * 3 for rank in found)


def test_a_group_made_again_has_a_name_of_its_own(found: list[dict[str, Any]]) -> None:
    assert all(rank["again"] == SIZE for rank in found)
    with RingReader(Path(found[0]["ring"])) as reader:
        names = [one.name for one in reader.read().communicators]
    assert "0" in names
    assert "0#2" in names
    assert len(set(names)) == len(names)


def test_every_operation_left_its_record(found: list[dict[str, Any]]) -> None:
    tables = []
    for rank, one in enumerate(found):
        path = Path(one["ring"])
        assert parse_name(path) is not None
        with RingReader(path) as reader:
            seen = reader.read()
        assert reader.identity.rank == rank
        assert len(seen.open_operations) == 0
        assert (seen.operations["start_ns"] >= seen.operations["enter_ns"]).all()
        assert (seen.operations["end_ns"] >= seen.operations["start_ns"]).all()
        assert not (seen.operations["flags"] & OpFlag.FAILED).any()
        table: dict[str, list[tuple[int, ...]]] = {}
        for record in seen.operations:
            name = seen.communicators[record["communicator"]].name
            key = ("sequence", "op_type", "element_type", "bytes")
            table.setdefault(name, []).append(tuple(int(record[field]) for field in key))
        for rows in table.values():
            assert [row[0] for row in rows] == list(range(1, len(rows) + 1))
        tables.append(table)
        types = {OpType(row[1]) for rows in table.values() for row in rows}
        assert types == set(OpType) - {OpType.NONE, OpType.OTHER}
    # All ranks tell the same story of the group of all (GATHER and SCATTER give each rank's own part).
    assert all(table["0"] == tables[0]["0"] for table in tables)
    sent, received = tables[0]["0/0->1"], tables[1]["0/0->1"]
    from_any = tables[1]["0/any->1"]  # a receiver that takes any sender numbers these by themselves
    assert (len(sent), len(received), len(from_any)) == (2, 1, 1)
    assert sent[0][2:] == received[0][2:]
    assert {row[1] for row in sent} == {OpType.SEND}
    assert {row[1] for row in received} == {OpType.RECV}
    assert (1, OpType.ALL_REDUCE, ElementType.FLOAT32, 0) in tables[0]["0"]


def test_groups_know_their_ranks_and_roles(found: list[dict[str, Any]]) -> None:
    for rank, one in enumerate(found):
        with RingReader(Path(one["ring"])) as reader:
            roles = {known.role: known.ranks for known in reader.read().communicators if known.role}
        assert roles == {"dp": (rank % 2, rank % 2 + 2), "tp": (rank // 2 * 2, rank // 2 * 2 + 1)}


def test_ring_operations_have_a_record_of_each_end_of_each_connection(found: list[dict[str, Any]]) -> None:
    tables: dict[tuple[int, int, int], dict[str, int]] = {}
    for rank, one in enumerate(found):
        with RingReader(Path(one["ring"])) as reader:
            seen = reader.read()
        world = [known.name for known in seen.communicators].index("0")
        ringed = seen.operations[(seen.operations["flags"] & OpFlag.RING) != 0]
        assert sorted(seen.edges["op_id"]) == sorted([*ringed["op_id"], *ringed["op_id"]])
        for edge in seen.edges[seen.edges["communicator"] == world]:
            link = (int(edge["sequence"]), int(edge["source"]), int(edge["destination"]))
            side = "out" if edge["source"] == rank else "in"
            tables.setdefault(link, {})[side] = (int(edge["messages"]), int(edge["bytes"]))
            assert (edge["destination"] - edge["source"]) % SIZE == 1
            if side == "in":
                assert min(edge["lateness_ns"], edge["wait_ns"], edge["transfer_ns"]) >= 0
    assert tables
    for link, ends in tables.items():
        assert ends["in"] == ends["out"], link


@pytest.mark.parametrize(
    ("description", "role"),
    [
        ("mesh_dp", "dp"), ("DATA_PARALLEL_GROUP", "dp"), ("dp_shard", "dp"), ("mesh_fsdp", "dp"), ("tp", "tp"),
        ("TENSOR_MODEL_PARALLEL_GROUP", "tp"), ("pipeline", "pp"), ("PIPELINE_MODEL_PARALLEL_GROUP", "pp"),
        ("expert_parallel", "ep"), ("default_pg", ""), ("undefined", ""), ("", ""), ("adept", ""),
    ],
)  # fmt: skip
def test_a_role_comes_from_the_description(description: str, role: str) -> None:
    assert role_of(description) == role
