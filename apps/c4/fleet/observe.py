"""What the agents of a simulated job report: its clock's times as observations, the same tables that live agents fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.c4.diagnosis.observation import (
    BLOCK_OPS,
    BlockRows,
    LinkBlockRows,
    LinkRows,
    Observation,
    ProcessState,
    ProgressRows,
    RankRows,
    concat,
    empty,
)
from actors.c4.recorder.records import ElementType, OpType
from apps.c4.fleet.clockwork import Pace, StepTimes
from apps.c4.fleet.faults import FleetFault, Injected
from apps.c4.fleet.rings import ring_progress
from apps.c4.fleet.shape import GPUS_PER_NODE, Shape


@dataclass(frozen=True)
class Struck:
    """A hang that has begun: the fault and when."""

    fault: FleetFault
    onset_s: float


@dataclass(frozen=True)
class _Role:
    group: NDArray[np.int32]
    """[X, D, T]"""
    rank: NDArray[np.int32]
    kind: OpType
    size: int


class Reporter:
    """Turns steps into observations. ``scenario`` picks one of the parallel courses."""

    def __init__(self, shape: Shape, pace: Pace, seed: int = 0):
        self.shape, self.pace = shape, pace
        self.rng = np.random.default_rng(seed)
        self.nodes = tuple(f"node{index:04d}" for index in range(shape.nodes))
        at, of = shape.group_index, shape.rank_of
        full = of.shape
        self.roles: dict[str, _Role] = {}
        if "tp" in at:
            self.roles["tp"] = _Role(
                np.broadcast_to(at["tp"][:, :, None], full), of, OpType.ALL_REDUCE, pace.tensor_bytes
            )
        if "ep" in at:
            expert = np.repeat(at["ep"], shape.expert, axis=1)
            self.roles["ep"] = _Role(expert, of, OpType.ALL_TO_ALL, pace.tensor_bytes)
        for name, source, to in (("forward", of[:-1], of[1:]), ("backward", of[1:], of[:-1])):
            self.roles[f"{name}_send"] = _Role(at[name], source, OpType.SEND, pace.pipeline_bytes)
            self.roles[f"{name}_recv"] = _Role(at[name], to, OpType.RECV, pace.pipeline_bytes)
        if "dp" in at:
            self.roles["dp"] = _Role(
                np.broadcast_to(at["dp"][:, None, :], full), of, OpType.ALL_REDUCE, pace.data_bytes
            )

    def observe(
        self,
        scenario: int,
        at_s: float,
        before: StepTimes | None,
        now: StepTimes,
        steps_before: int,
        step_s: float,
        blocks: Sequence[tuple[int, StepTimes]] = (),
        struck: Sequence[Struck] = (),
        links: bool = False,
    ) -> Observation:
        """The job at a moment.

        Args:
            before, now: the last two steps (a rank may still be in the former).
            steps_before: steps done before ``before``.
            step_s: typical step, as agents would tell.
            blocks: (index, times) of steps whose finished blocks are reported now.
            struck: hangs that have begun.
            links: whether to tell of connections of open operations.
        """
        moment = np.full(self.shape.rank_of.shape, at_s)
        for one in struck:
            if one.fault.kind is Injected.NODE_LOST:
                for rank in one.fault.ranks:
                    moment[self.shape.place(rank)] = one.onset_s
        past = [step for step in (before, now) if step is not None]
        progress, open_rows = self._progress(scenario, moment, past, steps_before, struck)
        parts = [self._blocks(scenario, at_s, index, step) for index, step in blocks]
        return Observation(
            at_s=at_s, generation=0, nodes=self.nodes, groups=self.shape.groups,
            ranks=self._ranks(at_s, step_s, struck),
            progress=progress,
            links=self._links(scenario, at_s, open_rows, struck) if links else empty(LinkRows),  # type: ignore[arg-type]
            blocks=concat([rows for rows, _ in parts]) if parts else empty(BlockRows),  # type: ignore[arg-type]
            link_blocks=concat([rows for _, rows in parts]) if parts else empty(LinkBlockRows),  # type: ignore[arg-type]
        )  # fmt: skip

    def _ranks(self, at_s: float, step_s: float, struck: Sequence[Struck]) -> RankRows:
        count, rng = self.shape.ranks, self.rng
        state = np.where(rng.random(count) < 0.5, ProcessState.RUNNING, ProcessState.SLEEPING).astype(np.uint8)
        beat = rng.uniform(0.0, 0.06, count)
        age = np.repeat(rng.uniform(0.0, 0.2, self.shape.nodes), GPUS_PER_NODE)
        for one in struck:
            ranks, since = list(one.fault.ranks), max(at_s - one.onset_s, 0.0)
            match one.fault.kind:
                case Injected.DEAD:
                    state[ranks], beat[ranks] = ProcessState.GONE, since
                case Injected.STOPPED:
                    state[ranks], beat[ranks] = ProcessState.STOPPED, since
                case Injected.GIL:
                    state[ranks], beat[ranks] = ProcessState.RUNNING, since
                case Injected.NODE_LOST:
                    age[ranks] = since
        return RankRows(
            np.arange(count, dtype=np.int32), np.repeat(np.arange(self.shape.nodes, dtype=np.int32), GPUS_PER_NODE), state,
            beat.astype(np.float32), age.astype(np.float32), np.full(count, np.nan, np.float32),
            (step_s * (1 + 0.02 * rng.standard_normal(count))).astype(np.float32),
        )  # fmt: skip

    @np.errstate(invalid="ignore")  # a time that never comes minus another one
    def _progress(self, scenario, moment, past, steps_before, struck):  # type: ignore[no-untyped-def]
        parts, opened = [], {}
        wrong = {one.fault.ranks[0]: one.fault for one in struck if one.fault.kind is Injected.MISMATCH}
        for name, role in self.roles.items():
            enter = np.concatenate([step.ops[name].enter[:, :, scenario] for step in past], axis=1)
            end = np.concatenate([step.ops[name].end[:, :, scenario] for step in past], axis=1)
            if not enter.size:
                continue
            # The ranks of a pair's first axis are those of its sending or receiving end.
            when = moment.ravel()[role.rank]
            entered = (enter <= when[:, None]).sum(axis=1)
            done = (end <= when[:, None]).sum(axis=1)
            base = steps_before * past[-1].ops[name].enter.shape[1]
            is_open = entered > done
            at = np.minimum(done, enter.shape[1] - 1)[:, None]
            since = np.take_along_axis(enter, at, axis=1)[:, 0]
            last = np.take_along_axis(end, np.maximum(done - 1, 0)[:, None], axis=1)[:, 0]
            began = np.where(done > 0, np.where(np.isfinite(last), last, when), when)
            size = np.where(is_open, role.size, 0).astype(np.int64)
            for rank, fault in wrong.items():
                if name == ("dp" if fault.bucket >= 0 else "tp"):
                    mine = (role.rank == rank) & is_open & ~np.isfinite(np.take_along_axis(end, at, axis=1)[:, 0])
                    size[mine] //= 2
            opened[name] = (is_open, done + base + 1, since, entered + base)
            parts.append(
                ProgressRows(
                    role.group.ravel().astype(np.int32), role.rank.ravel(), (entered + base).ravel().astype(np.int64),
                    (done + base).ravel().astype(np.int64), np.where(is_open, role.kind, 0).ravel().astype(np.uint8),
                    np.where(is_open, ElementType.BFLOAT16, 0).ravel().astype(np.uint8), size.ravel(),
                    np.where(is_open, when - since, np.nan).ravel().astype(np.float32),
                    np.where(is_open, np.nan, when - began).ravel().astype(np.float32),
                )
            )  # fmt: skip
        return concat(parts), opened

    def _blocks(self, scenario: int, at_s: float, index: int, step: StepTimes) -> tuple[BlockRows, LinkBlockRows]:
        parts, link_parts = [], []
        done: dict[str, tuple[NDArray, NDArray]] = {}
        for name, role in self.roles.items():
            ops = step.ops[name]
            stages, count = ops.enter.shape[:2]
            if not stages or not count:
                continue
            blocks = count // BLOCK_OPS
            size = (stages, blocks, BLOCK_OPS, self.shape.data, self.shape.tensor)
            enter, end, work = (table[:, :, scenario].reshape(size) for table in (ops.enter, ops.end, ops.work))
            finished = end[:, :, -1] <= at_s
            number = np.broadcast_to((index * blocks + np.arange(blocks))[None, :, None, None], finished.shape)
            group = np.broadcast_to(role.group[:, None], finished.shape)
            rank = np.broadcast_to(role.rank[:, None], finished.shape)
            with np.errstate(invalid="ignore"):
                wait = np.where(np.isfinite(end), end - enter, np.inf).mean(axis=2)
                before = np.roll(enter, 1, axis=4 if name == "tp" else 3)
                late = (
                    np.maximum(before - enter, 0).mean(axis=2) if name in ("tp", "dp") else np.full(wait.shape, np.nan)
                )
            done[name] = (finished, number)
            parts.append(
                BlockRows(
                    group[finished], rank[finished], number[finished], work.mean(axis=2)[finished].astype(np.float32),
                    wait[finished].astype(np.float32), late[finished].astype(np.float32),
                )
            )  # fmt: skip
        of = self.shape.rank_of
        shift = {"tp": np.roll(of, -1, axis=2), "dp": np.roll(of, -1, axis=1)}
        for name, (source, to, receiver, factor) in {
            "tp": (of, shift["tp"], "tp", 2 * (self.shape.tensor - 1) / self.shape.tensor),
            "dp": (of, shift["dp"], "dp", 2 * (self.shape.data - 1) / self.shape.data),
            "forward": (of[:-1], of[1:], "forward_recv", 1.0), "backward": (of[1:], of[:-1], "backward_recv", 1.0),
        }.items():  # fmt: skip
            if receiver not in done:
                continue
            finished, number = done[receiver]
            if name in shift:  # a ring's table is indexed by the sender, finished blocks by the receiver
                finished = np.roll(finished, -1, axis=3 if name == "tp" else 2)
            seconds = step.transfer[name][:, :, scenario]
            blocks = seconds.shape[1] // BLOCK_OPS
            total = seconds.reshape(len(seconds), blocks, BLOCK_OPS, *seconds.shape[2:]).sum(axis=2)
            group = self.roles[receiver].group
            amount = np.full(finished.shape, int(BLOCK_OPS * factor * self.roles[receiver].size), np.int64)
            link_parts.append(
                LinkBlockRows(
                    np.broadcast_to(group[:, None], finished.shape)[finished],
                    np.broadcast_to(source[:, None], finished.shape)[finished],
                    np.broadcast_to(to[:, None], finished.shape)[finished],
                    number[finished].astype(np.int64), amount[finished], total[finished].astype(np.float32),
                )
            )  # fmt: skip
        return concat(parts), concat(link_parts)  # type: ignore[return-value]

    def _links(self, scenario, at_s, opened, struck) -> LinkRows:  # type: ignore[no-untyped-def]
        parts = []
        for name, axis in (("tp", 2), ("dp", 1)):
            if name not in opened:
                continue
            is_open, sequence, since, _ = opened[name]
            stalled = np.full(is_open.shape, np.iinfo(np.int64).max)
            for one in struck:
                if one.fault.link is not None and (name == "dp") == (one.fault.bucket >= 0):
                    stalled[self.shape.place(one.fault.link[0])] = one.onset_s * 1e6 % 5  # some message or other
                if one.fault.kind is Injected.MISMATCH or one.fault.inside:
                    # A process that stands still neither passes on nor takes: its connection in and out carries nothing.
                    stalled[self.shape.place(one.fault.ranks[0])] = 0
            parts.append(self._ring_rows(self.roles[name], axis, is_open, sequence, since, stalled, at_s))
        return concat(parts) if parts else empty(LinkRows)  # type: ignore[return-value]

    def _ring_rows(self, role, axis, is_open, sequence, since, stalled, at_s) -> LinkRows:  # type: ignore[no-untyped-def]
        def rings(table: NDArray) -> NDArray:
            moved = np.moveaxis(table, axis, 2)
            return moved.reshape(-1, moved.shape[2])

        group, rank, opens, number, begin, stop = (
            rings(one) for one in (role.group, role.rank, is_open, sequence, since, stalled)
        )
        some = opens.any(axis=1)
        group, rank, opens, number, begin, stop = (one[some] for one in (group, rank, opens, number, begin, stop))
        if not len(group):
            return empty(LinkRows)  # type: ignore[return-value]
        # Of ranks in different operations of a ring the oldest is the one whose bytes could still move.
        oldest = np.where(opens, number, np.iinfo(np.int64).max).min(axis=1, keepdims=True)
        inside = opens & (number == oldest)
        sent, received = ring_progress(inside, stop)
        still = np.where(inside, begin, -np.inf).max(axis=1, keepdims=True)
        age = np.broadcast_to(np.maximum(at_s - still - 1e-3, 0), inside.shape)
        to, missing = np.roll(rank, -1, axis=1), np.full(sent.shape, -1)
        takes = np.roll(inside, -1, axis=1)
        rows = []
        for who, a, b in ((inside, sent, missing), (takes, missing, received)):
            rows.append(
                LinkRows(
                    group[who].astype(np.int32), rank[who], to[who], np.broadcast_to(oldest, who.shape)[who].astype(np.int64),
                    a[who].astype(np.int32), b[who].astype(np.int32), age[who].astype(np.float32),
                )
            )  # fmt: skip
        return concat(rows)  # type: ignore[return-value]


def split(observation: Observation) -> list[Observation]:
    """What each node's agent would report: its own ranks' rows, and the groups that those ranks are in."""
    home = np.zeros(1 + int(observation.ranks.rank.max()), dtype=np.int64)
    home[observation.ranks.rank] = observation.ranks.node
    tables: dict[str, list[Any]] = {}
    owner = {"ranks": "rank", "progress": "rank", "blocks": "rank", "link_blocks": "destination"}
    for name in ("ranks", "progress", "links", "blocks", "link_blocks"):
        rows = getattr(observation, name)
        if name == "links":
            node = home[np.where(rows.sent_messages >= 0, rows.source, rows.destination)]
        else:
            node = home[getattr(rows, owner[name])]
        order = np.argsort(node, kind="stable")
        bounds = np.searchsorted(node[order], np.arange(len(observation.nodes) + 1))
        columns = {field.name: getattr(rows, field.name)[order] for field in fields(rows)}
        tables[name] = [
            type(rows)(**{key: column[a:b] for key, column in columns.items()}) for a, b in pairwise(bounds)
        ]
    result = []
    for node, name in enumerate(observation.nodes):
        mine = {table: parts[node] for table, parts in tables.items()}
        used = np.unique(
            np.concatenate([mine[table].group for table in ("progress", "links", "blocks", "link_blocks")])
        )
        place = np.full(len(observation.groups), -1, dtype=np.int32)
        place[used] = np.arange(len(used))
        for table in ("progress", "links", "blocks", "link_blocks"):
            mine[table] = _changed(mine[table], "group", place[mine[table].group])
        mine["ranks"] = _changed(mine["ranks"], "node", np.zeros(len(mine["ranks"].rank), dtype=np.int32))
        groups = tuple(observation.groups[index] for index in used)
        result.append(Observation(observation.at_s, observation.generation, (name,), groups, **mine))
    return result


def _changed(rows: Any, column: str, values: NDArray) -> Any:
    return type(rows)(
        **{field.name: values if field.name == column else getattr(rows, field.name) for field in fields(rows)}
    )
