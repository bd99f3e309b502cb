"""The fabric lab: all-reduces of several jobs at once over Linux's own ECMP, by luck, by plan, with a cable cut."""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.c4.paths.errors import FabricError
from actors.c4.paths.plan import Plan, plan_paths
from actors.c4.paths.routing import Paths
from actors.c4.paths.simulate import Traffic, channel_rates
from actors.c4.paths.workload import Connections, job_connections, joined
from apps.c4.paths.fabric import LabShape, NamespaceFabric, sweep
from apps.c4.paths.lab_worker import LISTEN_PORT, Failed, Phase, Rank, Reduced, work

_FIRST_PORT, _PORTS = 49152, 16384


@dataclass(frozen=True)
class Wiring:
    """How the jobs' connections are put on the network: [C] each, in the order of the workload."""

    plane: tuple[int, ...]
    source_port: tuple[int, ...]
    spine: tuple[int, ...]
    """As traced."""


@dataclass(frozen=True)
class Measured:
    """One phase: bus bandwidth of each job in Mb/s of payload, and what the simulator says of the same paths."""

    busbw_mbps: tuple[float, ...]
    predicted_mbps: tuple[float, ...]
    wiring: Wiring

    @property
    def mean_mbps(self) -> float:
        return float(np.mean(self.busbw_mbps))

    @property
    def predicted_mean_mbps(self) -> float:
        return float(np.mean(self.predicted_mbps))


@dataclass(frozen=True)
class Cut:
    """A cable was cut in the middle of the planned run."""

    before: Measured
    after: Measured
    ideal_mbps: float
    """Mean of the jobs when flows could be split over what is left."""
    seconds_to_replan: float
    """From the cut until new rings with new ports had met."""


class Lab:
    """A fabric with jobs of two ranks on it, one rank in each group. ``budget_s`` bounds every wait."""

    def __init__(
        self, shape: LabShape, jobs: int, operation_bytes: int = 1 << 21, seed: int = 0, budget_s: float = 240.0
    ):
        count = shape.hosts_per_group
        if not 1 <= jobs <= count * shape.addresses:
            raise FabricError(f"The lab holds 1 to {count * shape.addresses} jobs, not {jobs}.")
        self.network = NamespaceFabric(shape)
        self.jobs, self.bytes = jobs, operation_bytes
        self._rng = np.random.default_rng(seed)
        self._deadline = time.monotonic() + budget_s
        self._phase = 0
        self._workers: list[tuple[Any, Any]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="sextant-lab-")
        nodes = [(job % count, count + (job + job // count) % count) for job in range(jobs)]
        self.connections: Connections = joined([job_connections(self.network.model, pair) for pair in nodes])
        self._place = [job // count for job in range(jobs)]

    def __enter__(self) -> Lab:
        try:
            sweep()
            self.network.__enter__()
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["torch", "actors.c4.recorder.backend", "apps.c4.paths.lab"])
            for job in range(self.jobs):
                for rank in (0, 1):
                    host = int(self.connections.src_nic[2 * job + rank])
                    here, there = context.Pipe()
                    process = context.Process(
                        target=work,
                        args=(Rank(job, rank, self.network.host(host)), there),
                        daemon=True,
                        name=f"job{job}.{rank}",
                    )
                    process.start()
                    there.close()
                    self._workers.append((process, here))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all ranks and deletes the fabric; twice does no harm."""
        for process, pipe in self._workers:
            process.kill()
            pipe.close()
        for process, _ in self._workers:
            process.join(5)
        self._workers = []
        self.network.close()
        self._folder.cleanup()

    # ---- wirings

    def luck(self) -> Wiring:
        """Random source ports; planes balanced as in the plan, so that only the spines are left to luck."""
        plane = self.plan().paths.rx
        ports = _FIRST_PORT + self._rng.integers(0, _PORTS, len(self.connections))
        spine = [self._trace(c, int(plane[c]), [int(ports[c])])[0] for c in range(len(plane))]
        return Wiring(tuple(map(int, plane)), tuple(map(int, ports)), tuple(spine))

    def plan(self) -> Plan:
        """One queue pair (TCP connection) for each connection."""
        return plan_paths(self.network.model, self.connections, 1, 1)

    def planned(self, plan: Plan | None = None) -> Wiring:
        """Source ports, found by tracing, that take the planned spines."""
        plan = self.plan() if plan is None else plan
        ports = [self._find(c, int(plan.paths.rx[c]), int(plan.paths.spine[c])) for c in range(len(self.connections))]
        return Wiring(tuple(map(int, plan.paths.rx)), tuple(ports), tuple(map(int, plan.paths.spine)))

    def _target(self, connection: int, plane: int) -> str:
        job = connection // 2
        return self.network.address(int(self.connections.dst_nic[connection]), plane, self._place[job])

    def _trace(self, connection: int, plane: int, ports: Sequence[int]) -> list[int]:
        host = int(self.connections.src_nic[connection])
        for _ in range(20):
            found = self.network.trace(host, self._target(connection, plane), LISTEN_PORT + self._phase, ports)
            known = [spine for spine in found if spine is not None]
            if len(known) == len(ports):
                return known
            time.sleep(0.05)
        raise FabricError("Probes get no answer from the spines.")

    def _find(self, connection: int, plane: int, spine: int) -> int:
        host, target = int(self.connections.src_nic[connection]), self._target(connection, plane)
        for _ in range(40):
            ports = [int(port) for port in _FIRST_PORT + self._rng.choice(_PORTS, 12, replace=False)]
            for port, seen in zip(
                ports, self.network.trace(host, target, LISTEN_PORT + self._phase, ports), strict=True
            ):
                # a second trace confirms the first
                if seen == spine and self.network.trace(host, target, LISTEN_PORT + self._phase, [port]) == [spine]:
                    return port
        raise FabricError(f"No source port towards {target} takes spine {spine}.")

    # ---- phases

    def measure(self, wire: Callable[[], Wiring], seconds: float) -> Measured:
        """All jobs at once over new connections; ``wire`` is asked after the listeners' port is known."""
        self._phase += 1
        wiring = wire()
        self._meet(wiring, seconds)
        self._go()
        return self._measured(wiring, self._gather())

    def cut_in_the_middle(self, leaf: int, spine: int, seconds: float) -> Cut:
        """A planned run; after a third of it a cable is cut; jobs are planned anew and run on."""
        self._phase += 1
        wiring = self.planned()
        self._meet(wiring, 60.0)
        self._go()
        time.sleep(seconds)
        cut_at = time.monotonic()
        self.network.fail(leaf, spine)
        self._phase += 1
        plan = self.best_single_paths()
        new = self.planned(plan)
        before = self._reconnect(new, seconds, cut_at)
        met = time.monotonic()
        self._go()
        after = self._measured(new, self._gather())
        return Cut(self._measured(wiring, before), after, self.ideal_mbps(), met - cut_at)

    def best_single_paths(self) -> Plan:
        """The plan after a failure. A TCP connection cannot be split over links, so a displaced one must share: both
        directions of one
        job with both of another slow two jobs down, and any other pairing more. The best of one exchange a job is taken."""
        best = self.plan()
        best_rate = float(self.predicted(self._wiring_of(best)).mean())
        model, spines = self.network.model, range(self.network.shape.spines)
        leaf = np.asarray(model.leaf(self.connections.src_nic, best.paths.tx))
        target = np.asarray(model.leaf(self.connections.dst_nic, best.paths.rx))
        broken = ~(model.up_alive.all(1))
        # only jobs that touch a leaf with a cut cable have anything to gain
        for job in range(self.jobs):
            a, b = 2 * job, 2 * job + 1
            if not broken[[leaf[a], target[a], leaf[b], target[b]]].any():
                continue
            for s, t in itertools.product(spines, spines):
                if not all(model.up_alive[leaf[c], x] and model.down_alive[target[c], x] for c, x in ((a, s), (b, t))):
                    continue
                spine = best.paths.spine.copy()
                spine[a], spine[b] = s, t
                tried = replace(best, paths=replace(best.paths, spine=spine))
                rate = float(self.predicted(self._wiring_of(tried)).mean())
                if rate > best_rate * (1 + 1e-6):
                    best, best_rate = tried, rate
        return best

    def _wiring_of(self, plan: Plan) -> Wiring:
        return Wiring(tuple(map(int, plan.paths.rx)), (0,) * len(self.connections), tuple(map(int, plan.paths.spine)))

    def predicted(self, wiring: Wiring) -> np.ndarray:
        """[jobs]: the simulator's bus bandwidth over the traced paths."""
        count = len(self.connections)
        plane, spine = np.array(wiring.plane), np.array(wiring.spine)
        traffic = Traffic(
            self.connections, np.arange(count), Paths(plane, spine, np.full(count, -1), plane), np.ones(count)
        )  # fmt: skip
        return channel_rates(self.network.model, traffic)

    def ideal_mbps(self) -> float:
        """Mean over planes of what a job can have when all of a plane's jobs share all that is left evenly."""
        plan = self.plan()
        totals = []
        for c in range(len(self.connections)):
            plane = int(plan.paths.rx[c])
            together = np.flatnonzero(plan.paths.rx == plane)
            mine = self.network.model
            leaf = int(mine.leaf(self.connections.src_nic[c], plane))
            target = int(mine.leaf(self.connections.dst_nic[c], plane))
            rate = self.network.shape.spec().port_gbps
            for node, usable, ends in (
                (leaf, mine.up_alive, mine.leaf(self.connections.src_nic[together], plane)),
                (target, mine.down_alive, mine.leaf(self.connections.dst_nic[together], plane)),
            ):
                crowd = int((np.asarray(ends) == node).sum())
                rate = min(rate, rate * usable[node].sum() / crowd)
            totals.append(rate)
        # a ring is as fast as its slower connection
        return float(np.mean([min(totals[2 * job], totals[2 * job + 1]) for job in range(self.jobs)]))

    def _phases(self, wiring: Wiring, seconds: float) -> list[Phase]:
        found = []
        for job, rank in itertools.product(range(self.jobs), (0, 1)):
            out, into = 2 * job + rank, 2 * job + 1 - rank
            found.append(Phase(
                self._phase, self._target(into, wiring.plane[into]), wiring.source_port[out],
                str(Path(self._folder.name) / f"store{self._phase}.{job}"), seconds, self.bytes,
            ))  # fmt: skip
        return found

    def _meet(self, wiring: Wiring, seconds: float) -> None:
        for (_, pipe), phase in zip(self._workers, self._phases(wiring, seconds), strict=True):
            pipe.send(phase)
        self._introduce()

    def _introduce(self) -> None:
        for place in range(len(self._workers)):
            self._answer(place, "initialised")
        for _, pipe in self._workers:
            pipe.send("meet")
        for place in range(len(self._workers)):
            self._answer(place, "ready")

    def _reconnect(self, wiring: Wiring, seconds: float, cut_at: float) -> list[Reduced]:
        """The next phase for ranks that are at work: the results of the one that ends by it, only what was before the cut."""
        for (_, pipe), phase in zip(self._workers, self._phases(wiring, seconds), strict=True):
            pipe.send(phase)
        ended: list[Reduced] = []
        for place in range(len(self._workers)):
            reduced = self._receive(place)
            ended.append(replace(reduced, ended_s=tuple(at for at in reduced.ended_s if at <= cut_at)))
        self._introduce()
        return ended

    def _go(self) -> None:
        for _, pipe in self._workers:
            pipe.send("go")

    def _gather(self) -> list[Reduced]:
        return [self._receive(place) for place in range(len(self._workers))]

    def _receive(self, place: int) -> Reduced:
        answer = self._answer(place)
        if not isinstance(answer, Reduced):
            raise FabricError(f"A rank of the lab said {answer!r} out of turn.")
        return answer

    def _answer(self, place: int, wanted: str | None = None) -> Any:
        process, pipe = self._workers[place]
        if not pipe.poll(max(0.0, self._deadline - time.monotonic())):
            raise FabricError(f"The lab's time is up while {process.name} is at work.")
        try:
            answer = pipe.recv()
        except EOFError as error:
            raise FabricError(f"The rank {process.name} of the lab died (exit code {process.exitcode}).") from error
        if isinstance(answer, Failed):
            raise FabricError(f"The rank {process.name} failed: {answer.error.strip().splitlines()[-1]}")
        if wanted is not None and answer != wanted:
            raise FabricError(f"The rank {process.name} of the lab said {answer!r} and not {wanted!r}.")
        return answer

    def _measured(self, wiring: Wiring, results: Sequence[Reduced]) -> Measured:
        """Two ranks: 2 (n - 1) / n = 1, so bus bandwidth is bytes over seconds. Only the time in which all jobs ran counts."""
        until = min(max(result.ended_s, default=result.began_s) for result in results)
        rates = []
        for job in range(self.jobs):
            mine = results[2 * job]
            within = [at for at in mine.ended_s if at <= until + 1e-9]
            if not within:
                raise FabricError("A job of the lab ended no operation: give it more time or smaller operations.")
            rates.append(len(within) * self.bytes * 8 / 1e6 / (within[-1] - mine.began_s))
        return Measured(tuple(rates), tuple(map(float, self.predicted(wiring))), wiring)
