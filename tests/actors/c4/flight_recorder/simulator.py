"""A small discrete simulator of a Megatron-like job (DP x TP x PP, experts over DP x TP) that hangs, and the dumps it leaves.

Every rank has a host that runs a program (enqueue, wait on the device) and a device that runs what is enqueued: collectives of a
group in order, point-to-point operations of a route in order, and a compute stream that waits for what the program makes it wait
for. An operation completes when all its members began it. Ranks advance in random order; at a random moment faults strike; all
runs on until nothing moves. Then each rank is dumped in Flight Recorder's schema. The simulator knows the culprits
because it injected them; it shares no code with the diagnosis.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass, field

from tests.actors.c4.flight_recorder.megatron import Layout, Step, program_of


class Fault(enum.Enum):
    HOST_STOP = "host stops: GIL locked, exception, endless loop"
    HOST_STOP_EMPTY = "host stops, and the dump is an empty file"
    KILLED = "process gone: no dump"
    GPU_ERROR = "device context dead: no progress, no more observing, host raises at its next call"
    GPU_SLEEP = "compute stream stuck; the host runs on to its next wait"
    SKIP = "one collective is skipped"
    OTHER_OP = "another collective is called"


@dataclass
class Rank:
    program: list[Step]
    host: int = 0  # next line
    queue: list[int] = field(default_factory=list)  # enqueued lines (operations and stream waits), in order
    began: set[int] = field(default_factory=set)
    open: list[int] = field(default_factory=list)  # began and not known to be done, in order
    done: set[int] = field(default_factory=set)
    stream: int = 0  # index into queue: how far the compute stream is
    seen: set[int] = field(default_factory=set)  # completions that the watchdog noticed
    host_dead: bool = False
    device_dead: bool = False
    stream_dead: bool = False
    raises: bool = False
    observer_dead: bool = False


class Simulation:
    def __init__(self, layout: Layout, seed: int, lookahead: int = 400):
        self.layout = layout
        self.random = random.Random(seed)
        self.groups = layout.groups()
        self.lookahead = lookahead
        self.ranks = [Rank(program_of(layout, rank)) for rank in range(layout.world)]
        self.route_of: dict[tuple, dict[str, list[int]]] = {}
        self.index: list[dict[tuple, int]] = [{} for _ in self.ranks]
        self.began_by: dict[tuple, dict[int, int]] = {}
        self.altered = False
        self.clock = self.random.randint(0, 100)
        self.poll_rounds = 10  # a watchdog looks ten times a second; between two looks dozens of operations complete

    # ---- running

    def _key(self, rank: int, line: int) -> tuple:
        step = self.ranks[rank].program[line]
        if step.name in ("send", "recv"):
            return (step.group, step.source, step.target, self.index[rank][line])
        return (step.group, step.seq)

    def _members(self, step: Step) -> tuple[int, ...]:
        ranks = self.groups[step.group][1]
        return (ranks[step.source], ranks[step.target]) if step.name in ("send", "recv") else ranks

    def advance_host(self, rank: int) -> bool:
        me = self.ranks[rank]
        if me.host_dead or me.host >= len(me.program):
            return False
        if me.raises:
            me.host_dead = True
            return True
        step = me.program[me.host]
        if step.wait_host:
            if me.stream < len(me.queue):
                return False
            me.host += 1
            return True
        if len(me.queue) - len(me.done) > self.lookahead:
            return False
        if step.name in ("send", "recv"):
            route = self.route_of.setdefault((step.group, step.source, step.target), {"send": [], "recv": []})[
                step.name
            ]
            self.index[rank][me.host] = len(route)
            route.append(me.host)
        me.queue.append(me.host)
        me.host += 1
        return True

    def advance_device(self, rank: int) -> bool:
        me = self.ranks[rank]
        if me.device_dead:
            return False
        moved = False
        while me.stream < len(me.queue) and not me.stream_dead:
            line = me.queue[me.stream]
            step = me.program[line]
            if step.wait_for >= 0:
                if step.wait_for not in me.done:
                    break
                me.stream += 1
                moved = True
                continue
            if line not in me.began:
                me.began.add(line)
                me.open.append(line)
                self.began_by.setdefault(self._key(rank, line), {})[rank] = line
                moved = True
            if step.blocking and line not in me.done:
                break
            me.stream += 1
            moved = True
        for line in list(me.open):
            if line in me.done:
                me.open.remove(line)
                continue
            step = me.program[line]
            members = self._members(step)
            key = self._key(rank, line)
            here = self.began_by.get(key, {})
            if len(here) < len(members) or any(self.ranks[member].device_dead for member in members):
                continue
            if self.altered and not self._agree(members, step):
                continue
            for member in members:
                self.ranks[member].done.add(here[member])
            me.open.remove(line)
            moved = True
        return moved

    def _agree(self, members: tuple[int, ...], step: Step) -> bool:
        if step.name in ("send", "recv"):
            return True
        names = set()
        for member in members:
            for other in self.ranks[member].program:
                if other.group == step.group and other.seq == step.seq and other.name:
                    names.add((other.name, other.numel))
                    break
        return len(names) == 1

    def run(self, rounds: int | None = None) -> None:
        """``rounds`` of random moves, or until nothing moves."""
        done_rounds = 0
        while rounds is None or done_rounds < rounds:
            done_rounds += 1
            order = list(range(len(self.ranks)))
            self.random.shuffle(order)
            moved = False
            for rank in order:
                for _ in range(self.random.randint(1, 6)):
                    if not self.advance_host(rank):
                        break
                    moved = True
                moved = self.advance_device(rank) or moved
            self.clock += 1
            if self.clock % self.poll_rounds == 0:
                for rank in self.ranks:
                    if not rank.observer_dead:
                        rank.seen = set(rank.done)
            if not moved:
                break
        if rounds is None:  # a dump asks for the state of every operation itself
            for rank in self.ranks:
                if not rank.observer_dead:
                    rank.seen = set(rank.done)

    def strike(self, rank: int, fault: Fault) -> None:
        me = self.ranks[rank]
        if fault in (Fault.HOST_STOP, Fault.HOST_STOP_EMPTY):
            me.host_dead = True
        elif fault is Fault.KILLED:
            me.host_dead = me.device_dead = me.observer_dead = True
        elif fault is Fault.GPU_ERROR:
            me.device_dead = me.observer_dead = me.raises = True
        elif fault is Fault.GPU_SLEEP:
            me.stream_dead = True
        elif fault in (Fault.SKIP, Fault.OTHER_OP):
            self.altered = True
            self._alter(me, fault)

    def _alter(self, me: Rank, fault: Fault) -> None:
        for line in range(me.host, len(me.program)):
            step = me.program[line]
            if step.name and step.name not in ("send", "recv") and len(self.groups[step.group][1]) > 2:
                if fault is Fault.OTHER_OP:
                    step.name, step.numel = "broadcast", 7
                    return
                if step.name == "all_to_all":
                    continue  # the next one looks the same
                for later in me.program[line + 1 :]:
                    if later.group == step.group:
                        later.seq -= 1
                step.name, step.group, step.wait_for = "", "", -1
                me.program[line] = Step(wait_host=True)
                return
        raise LookupError("nothing left to alter")

    # ---- dumping

    def dump(self, rank: int, active_only: bool = True, timing: bool = False, buffer: int = 2000) -> dict:
        """The dump of ``rank`` as a dict in the schema of PyTorch 2.9."""
        me = self.ranks[rank]
        own = [name for name, (_, ranks) in self.groups.items() if rank in ranks]
        ids = {name: number for number, name in enumerate(own)}
        entries, status = [], {}
        counts: dict[tuple[str, bool], int] = {}
        lines = [line for line in me.queue if me.program[line].name]
        for record, line in enumerate(lines):
            step = me.program[line]
            p2p = step.name in ("send", "recv")
            counts[step.group, p2p] = counts.get((step.group, p2p), 0) + 1
            completed, started = line in me.seen, line in me.began
            number = counts[step.group, p2p]
            state = status.setdefault(str(ids[step.group]), [0, -1])
            state[0] = number
            if completed:
                state[1] = max(state[1], number)
            if p2p:
                here, there = (step.source, step.target) if step.name == "send" else (step.target, step.source)
                name = f"nccl:{step.name} {here}{'->' if step.name == 'send' else '<-'}{there}"
            else:
                name = f"nccl:{step.name}"
            if active_only and completed:
                continue
            time = 1_700_000_000_000_000_000 + line * 1_000_000
            entries.append(
                {
                    "record_id": record,
                    "pg_id": ids[step.group],
                    "process_group": (step.group, self.groups[step.group][0]),
                    "collective_seq_id": counts.get((step.group, False), 0),
                    "p2p_seq_id": counts.get((step.group, True), 0),
                    "op_id": number,
                    "profiling_name": name,
                    "time_created_ns": time,
                    "input_sizes": [[step.numel]],
                    "input_dtypes": ["BFloat16"],
                    "output_sizes": [[step.numel]],
                    "output_dtypes": ["BFloat16"],
                    "state": "completed" if completed else "started" if timing and started else "scheduled",
                    "time_discovered_started_ns": time + 10 if timing and started else None,
                    "time_discovered_completed_ns": time + 20 if completed else None,
                    "retired": completed,
                    "timeout_ms": 600000,
                    "is_p2p": p2p,
                }
            )
        return {
            "version": "2.9",
            "nccl_version": "2.27.3",
            "pg_config": {
                name: {"name": name, "desc": self.groups[name][0], "ranks": str(list(self.groups[name][1]))}
                for name in own
            },
            "pg_status": {
                key: {
                    "last_enqueued_collective": last,
                    "last_started_collective": -1,
                    "last_completed_collective": done,
                }
                for key, (last, done) in status.items()
            },
            "entries": entries[-buffer:],
        }


@dataclass(frozen=True)
class Case:
    """A finished simulation: what every rank left (None: no dump), who was made to fail, and whose fault leaves a trace."""

    dumps: dict[int, dict | None]
    culprits: dict[int, Fault]
    provable: frozenset[int]
    """Culprits that the dumps give away. A second fault may strike a rank that the first one has already stopped for good, and a
    device may die without having missed anything: nothing in any dump then tells that rank from those that only wait."""
    simulation: Simulation

    @property
    def truth(self) -> frozenset[int]:
        return frozenset(self.culprits)


_HOST_FAULTS = (Fault.HOST_STOP, Fault.HOST_STOP_EMPTY, Fault.KILLED)
_NEED_ALL = ("_all_gather_base", "_reduce_scatter_base", "all_reduce")


def simulate(
    layout: Layout,
    faults: list[Fault],
    seed: int,
    active_only: bool = True,
    timing: bool = False,
    buffer: int = 2000,
    gap: int = 0,
) -> Case:
    """Lets ``faults`` strike random ranks at a random moment, ``gap`` rounds apart, and dumps all ranks when nothing moves."""
    chance = random.Random(seed * 7919 + 1)
    victims = dict(zip(chance.sample(range(layout.world), len(faults)), faults, strict=True))
    start = chance.randint(5, 60)
    simulation = _play(layout, seed, start, gap, victims, victims)
    dumps: dict[int, dict | None] = {}
    for rank in range(layout.world):
        fault = victims.get(rank)
        dumps[rank] = (
            None
            if fault in (Fault.KILLED, Fault.HOST_STOP_EMPTY)
            else simulation.dump(rank, active_only, timing, buffer)
        )
    provable = {
        rank
        for rank, fault in victims.items()
        if _leaves_trace(simulation, layout, seed, start, gap, victims, rank, fault, timing)
    }
    return Case(dumps, victims, frozenset(provable), simulation)


def _play(layout: Layout, seed: int, start: int, gap: int, victims: dict[int, Fault], struck) -> Simulation:
    simulation = Simulation(layout, seed)
    simulation.run(start)
    for rank, fault in victims.items():
        if rank in struck:
            simulation.strike(rank, fault)
        if gap:
            simulation.run(gap)
    simulation.run()
    return simulation


def _leaves_trace(simulation, layout, seed, start, gap, victims, rank, fault, timing) -> bool:
    me = simulation.ranks[rank]
    if fault in _HOST_FAULTS:
        if len(victims) == 1:
            return True
        # Without its own fault, and with all others, this host would have got further.
        without = _play(layout, seed, start, gap, victims, victims.keys() - {rank})
        return without.ranks[rank].host > me.host
    if fault is Fault.GPU_ERROR:
        # It took part in a collective that nobody completes without it, a live peer saw that complete, and it did not.
        for line in me.done - me.seen:
            step = me.program[line]
            members = simulation.groups[step.group][1]
            if step.name in _NEED_ALL and any(
                not simulation.ranks[other].observer_dead for other in members if other != rank
            ):
                return True
        return False
    if fault is Fault.GPU_SLEEP:
        return timing and len(victims) == 1
    return len(victims) == 1
