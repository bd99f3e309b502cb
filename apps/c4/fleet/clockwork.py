"""The simulated job's clock: when every rank enters and ends every operation of a step, with noise, pauses and faults.

Max-plus arithmetic over arrays [stage, scenario, data, tensor]: an operation ends when its last member has come and its slowest
connection is through; a receive ends when the message is there. A rank that hangs comes at infinity, and so does whatever
depends on it: slowness and hangs travel through the groups as in a real job. Several scenarios run side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from apps.c4.fleet.faults import FleetFault, Injected
from apps.c4.fleet.shape import GPUS_PER_NODE, Shape

Times = NDArray[np.float64]


@dataclass(frozen=True)
class Pace:
    """How long things take in health (seconds, bytes). Assumptions of the simulator, not measurements."""

    forward_s: float = 0.012
    """A stage's forward pass of a micro-batch."""
    backward_s: float = 0.024
    optimizer_s: float = 0.030
    bucket_s: float = 0.010
    """Own work before each data-parallel all-reduce."""
    expert_s: float = 0.005
    """An expert layer's work; depends on the data."""
    tensor_bytes: int = 32 << 20
    data_bytes: int = 512 << 20
    pipeline_bytes: int = 128 << 20
    inside_bytes_per_s: float = 3.0e10
    """A connection inside a node."""
    across_bytes_per_s: float = 2.2e10
    """A connection between nodes."""
    latency_s: float = 3e-5
    noise: float = 0.10
    """Standard deviation of every duration, relative."""
    spread: float = 0.03
    """Lasting differences between healthy ranks and between healthy connections, relative."""
    stage_weight: tuple[float, float] = (1.12, 1.30)
    """The first stage embeds, the last one has the loss: they work longer than those between."""
    imbalance: float = 0.45
    """Of expert layers: standard deviation of the logarithm of a rank's load, drawn anew for each pass."""


@dataclass
class Ops:
    """Operations of one step in one role. All [stage or pair, operation, scenario, data, tensor]."""

    enter: Times
    end: Times
    work: Times
    """Own time since the rank's previous operation."""


@dataclass
class StepTimes:
    """One step of all scenarios."""

    ops: dict[str, Ops]
    """By role: tp, dp, ep; forward_send, forward_recv, backward_send, backward_recv (pair of stages first)."""
    transfer: dict[str, Times]
    """Seconds that a connection carried bytes: tp, dp (from the member at an index to the next), forward, backward."""


@dataclass
class Effects:
    """What faults do to the arrays; factors 1 in health. [stage, scenario, data, tensor]; pipeline edges [stage - 1, ...]."""

    work: Times
    tp: Times
    dp: Times
    forward: Times
    backward: Times
    hangs: list[tuple[int, FleetFault]] = field(default_factory=list)
    """(scenario, fault) that strikes in the next step."""


def no_effects(shape: Shape, scenarios: int) -> Effects:
    full = (shape.pipeline, scenarios, shape.data, shape.tensor)
    less = (max(shape.pipeline - 1, 0), *full[1:])
    return Effects(np.ones(full), np.ones(full), np.ones(full), np.ones(less), np.ones(less))


def effects_of(shape: Shape, faults: Sequence[Sequence[FleetFault]]) -> Effects:
    """The effects of a list of faults for each scenario."""
    effects = no_effects(shape, len(faults))
    for scenario, mine in enumerate(faults):
        for fault in mine:
            if fault.kind.is_hang:
                effects.hangs.append((scenario, fault))
            elif fault.kind in (Injected.WORK_SLOW, Injected.NODE_WORK_SLOW):
                for rank in fault.ranks:
                    p, d, t = shape.place(rank)
                    effects.work[p, scenario, d, t] *= fault.factor
            elif fault.link is not None:
                _slow_edge(shape, effects, scenario, fault.link, fault.factor)
            else:
                for link in network_links(shape, fault.ranks, sends=fault.kind is Injected.SENDER_SLOW):
                    _slow_edge(shape, effects, scenario, link, fault.factor)
    return effects


def network_links(shape: Shape, ranks: Sequence[int], sends: bool) -> list[tuple[int, int]]:
    """Connections between nodes that begin (or end) at ``ranks``."""
    of, found = shape.rank_of, []
    for rank in ranks:
        p, d, t = shape.place(rank)
        step = 1 if sends else -1
        others = [int(of[p, (d + step) % shape.data, t])] if shape.data > 1 else []
        others += [int(of[q, d, t]) for q in (p - 1, p + 1) if 0 <= q < shape.pipeline]
        found += [(rank, other) if sends else (other, rank) for other in others]
    return [(a, b) for a, b in found if a // GPUS_PER_NODE != b // GPUS_PER_NODE]


def _slow_edge(shape: Shape, effects: Effects, scenario: int, link: tuple[int, int], factor: float) -> None:
    (p, d, t), (q, e, _) = shape.place(link[0]), shape.place(link[1])
    if q == p + 1:
        effects.forward[p, scenario, d, t] *= factor
    elif q == p - 1:
        effects.backward[q, scenario, d, t] *= factor
    elif d == e:
        effects.tp[p, scenario, d, t] *= factor
    else:
        effects.dp[p, scenario, d, t] *= factor


class Clockwork:
    """A job of ``scenarios`` parallel courses, advanced a step at a time."""

    def __init__(self, shape: Shape, pace: Pace, seed: int, scenarios: int = 1):
        self.shape, self.pace = shape, pace
        self.rng = np.random.default_rng(seed)
        full = (shape.pipeline, scenarios, shape.data, shape.tensor)
        one = (shape.pipeline, 1, shape.data, shape.tensor)
        self.free = np.zeros(full)
        """End of each rank's last operation."""
        self.pending = np.zeros(full)
        """Own time spent after it already: the optimizer's, or a pause."""
        weight = np.ones(shape.pipeline)
        if shape.pipeline > 1:
            weight[0], weight[-1] = pace.stage_weight
        self.worth = weight[:, None, None, None] * self._lasting(one)
        less = (max(shape.pipeline - 1, 0), *one[1:])
        self.speed = {
            "tp": self._lasting(one),
            "dp": self._lasting(one),
            "forward": self._lasting(less),
            "backward": self._lasting(less),
        }
        across = shape.rank_of // GPUS_PER_NODE != np.roll(shape.rank_of, -1, axis=1) // GPUS_PER_NODE
        self.data_rate = np.where(across, pace.across_bytes_per_s, pace.inside_bytes_per_s)[:, None]

    def fork(self, scenarios: int, seed: int) -> Clockwork:
        """Courses that share the past up to now and differ from here."""
        other = Clockwork.__new__(Clockwork)
        other.__dict__.update(self.__dict__)
        other.rng = np.random.default_rng(seed)
        other.free = np.repeat(self.free[:, :1], scenarios, axis=1)
        other.pending = np.repeat(self.pending[:, :1], scenarios, axis=1)
        return other

    def _lasting(self, size: tuple[int, ...]) -> Times:
        return 1 + self.pace.spread * np.clip(self.rng.standard_normal(size), -3, 3)

    def _noise(self, size: tuple[int, ...]) -> Times:
        return np.maximum(1 + self.pace.noise * self.rng.standard_normal(size, dtype=np.float32), 0.3)

    def pause(self, seconds: Times) -> None:
        """Adds own time (garbage collection, checkpoint, evaluation) of each rank before its next operation."""
        self.pending = self.pending + seconds

    def step(self, effects: Effects) -> StepTimes:
        """One step of every scenario."""
        shape = self.shape
        scenarios = self.free.shape[1]
        tail = (scenarios, shape.data, shape.tensor)
        turns, m = 2 * shape.micro_batches, shape.micro_batches
        pairs = max(shape.pipeline - 1, 0)
        counts = {"tp": turns * shape.layers, "dp": shape.buckets if shape.data > 1 else 0,
                  "ep": 2 * turns * shape.layers if shape.expert > 1 else 0}  # fmt: skip
        self._ops = {role: _empty((shape.pipeline, count, *tail)) for role, count in counts.items()}
        for role in ("forward_send", "forward_recv", "backward_send", "backward_recv"):
            self._ops[role] = _empty((pairs, m, *tail))
        self._transfer = {role: np.empty((shape.pipeline, counts[role], *tail)) for role in ("tp", "dp")}
        self._transfer |= {name: np.empty((pairs, m, *tail)) for name in ("forward", "backward")}
        self._turn = np.zeros(shape.pipeline, dtype=int)
        for wave in shape.order:
            self._wave(wave, effects)
        for bucket in range(counts["dp"]):
            self._reduce(bucket, effects)
        self.pending = self.pending + self.pace.optimizer_s * self.worth * effects.work * self._noise(self.free.shape)
        return StepTimes(self._ops, self._transfer)

    def _wave(self, wave: tuple[tuple[int, bool, int], ...], effects: Effects) -> None:
        shape, pace = self.shape, self.pace
        stages = np.array([stage for stage, _, _ in wave])
        back = np.array([backward for _, backward, _ in wave])
        micro = np.array([m for _, _, m in wave])
        self._receive(stages, back, micro)
        base = np.where(back, pace.backward_s, pace.forward_s)[:, None, None, None] / shape.layers
        turn = self._turn[stages]
        rate = pace.inside_bytes_per_s
        ring = 2 * (shape.tensor - 1) / shape.tensor * pace.tensor_bytes
        for layer in range(shape.layers):
            own = base * self.worth[stages] * effects.work[stages] * self._noise(self.free[stages].shape)
            if layer == 0:
                self._stick(stages, turn, own, effects)
            transfer = ring / rate * effects.tp[stages] * self.speed["tp"][stages] * self._noise(own.shape)
            if layer == 0:
                for scenario, fault in effects.hangs:
                    self._stall_turn(scenario, fault, stages, turn, transfer)
            enter, work = self._enter(stages, own)
            end = np.broadcast_to((enter.max(axis=3) + pace.latency_s + transfer.max(axis=3))[..., None], enter.shape)
            at = turn * shape.layers + layer
            self._put("tp", stages, at, enter, end, work)
            self._transfer["tp"][stages, at] = transfer
            if shape.expert > 1:
                self._experts(stages, 2 * at, effects)
        self._send(stages, back, micro, effects)
        self._turn[stages] += 1

    def _receive(self, stages: NDArray, back: NDArray, micro: NDArray) -> None:
        for name, who, shift in (
            ("forward", ~back & (stages > 0), 1),
            ("backward", back & (stages + 1 < self.shape.pipeline), 0),
        ):
            mine, m = stages[who], micro[who]
            if not len(mine):
                continue
            pair = mine - shift
            enter, work = self._enter(mine, 2e-4 * self._noise(self.free[mine].shape))
            arrival = self._ops[f"{name}_send"].end[pair, m]
            self._put(f"{name}_recv", pair, m, enter, np.maximum(enter, arrival), work, mine)

    def _send(self, stages: NDArray, back: NDArray, micro: NDArray, effects: Effects) -> None:
        pace = self.pace
        for name, who, shift in (
            ("forward", ~back & (stages + 1 < self.shape.pipeline), 0),
            ("backward", back & (stages > 0), 1),
        ):
            mine, m = stages[who], micro[who]
            if not len(mine):
                continue
            pair = mine - shift
            enter, work = self._enter(mine, 2e-4 * self._noise(self.free[mine].shape))
            edge = getattr(effects, name)[pair] * self.speed[name][pair]
            transfer = pace.pipeline_bytes / pace.across_bytes_per_s * edge * self._noise(enter.shape)
            for scenario, fault in effects.hangs:
                self._stall_send(scenario, fault, name, pair, m, transfer)
            self._put(f"{name}_send", pair, m, enter, enter + pace.latency_s + transfer, work, mine)
            self._transfer[name][pair, m] = transfer

    def _experts(self, stages: NDArray, at: NDArray, effects: Effects) -> None:
        shape, pace = self.shape, self.pace
        for part in range(2):
            own = 5e-4 * self._noise(self.free[stages].shape)
            if part:
                load = np.exp(pace.imbalance * self.rng.standard_normal(own.shape) - pace.imbalance**2 / 2)
                own = own + pace.expert_s * load * effects.work[stages]
            enter, work = self._enter(stages, own)
            k, s, d, t = enter.shape
            last = enter.reshape(k, s, d // shape.expert, shape.expert, t).max(axis=3, keepdims=True)
            end = np.broadcast_to(last + 4e-3, (k, s, d // shape.expert, shape.expert, t)).reshape(enter.shape)
            self._put("ep", stages, at + part, enter, end, work)

    def _reduce(self, bucket: int, effects: Effects) -> None:
        shape, pace = self.shape, self.pace
        stages = np.arange(shape.pipeline)
        enter, work = self._enter(stages, pace.bucket_s * self.worth * effects.work * self._noise(self.free.shape))
        ring = 2 * (shape.data - 1) / shape.data * pace.data_bytes
        transfer = ring / self.data_rate * effects.dp * self.speed["dp"] * self._noise(enter.shape)
        for scenario, fault in effects.hangs:
            if fault.bucket == bucket:
                p, d, t = shape.place(fault.link[0] if fault.link else fault.ranks[0])
                transfer[p, scenario, d, t] = np.inf
        end = np.broadcast_to((enter.max(axis=2) + pace.latency_s + transfer.max(axis=2))[:, :, None], enter.shape)
        at = np.full(shape.pipeline, bucket)
        self._put("dp", stages, at, enter, end, work)
        self._transfer["dp"][stages, at] = transfer

    def _stick(self, stages: NDArray, turn: NDArray, own: Times, effects: Effects) -> None:
        """Ranks that stop in the middle of their own work."""
        for scenario, fault in effects.hangs:
            if fault.kind in (Injected.MISMATCH, Injected.LINK_STALL) or fault.inside:
                continue
            for rank in fault.ranks:
                p, d, t = self.shape.place(rank)
                for at in np.flatnonzero((stages == p) & (turn == fault.wave)):
                    own[at, scenario, d, t] = np.inf

    def _stall_turn(self, scenario: int, fault: FleetFault, stages: NDArray, turn: NDArray, transfer: Times) -> None:
        """A tensor-parallel all-reduce that all enter and that does not end."""
        inside = fault.kind is Injected.MISMATCH or (fault.inside and not fault.link)
        if fault.bucket >= 0 or not (inside or fault.kind is Injected.LINK_STALL):
            return
        p, d, t = self.shape.place(fault.link[0] if fault.link else fault.ranks[0])
        if fault.link and self.shape.place(fault.link[1])[:2] != (p, d):
            return
        for at in np.flatnonzero((stages == p) & (turn == fault.wave)):
            transfer[at, scenario, d, t] = np.inf

    def _stall_send(
        self, scenario: int, fault: FleetFault, name: str, pair: NDArray, micro: NDArray, transfer: Times
    ) -> None:
        if fault.kind is not Injected.LINK_STALL or fault.link is None:
            return
        (p, d, t), (q, _, _) = self.shape.place(fault.link[0]), self.shape.place(fault.link[1])
        if q - p != (1 if name == "forward" else -1):
            return
        for at in np.flatnonzero((pair == min(p, q)) & (micro == fault.wave % self.shape.micro_batches)):
            transfer[at, scenario, d, t] = np.inf

    def _enter(self, stages: NDArray, own: Times) -> tuple[Times, Times]:
        work = own + self.pending[stages]
        self.pending[stages] = 0.0
        return self.free[stages] + work, work

    def _put(self, role, where, at, enter, end, work, stages=None) -> None:  # type: ignore[no-untyped-def]
        table = self._ops[role]
        table.enter[where, at], table.end[where, at], table.work[where, at] = enter, end, work
        self.free[where if stages is None else stages] = end


def _empty(size: tuple[int, ...]) -> Ops:
    return Ops(np.empty(size), np.empty(size), np.empty(size))
