"""Hybrid orchestration for real, on CPU shares (an analogue of MIG): a server and a training in slices of this machine's cores,
a diurnal Poisson load, and re-cuts by ``actors.mig.hybrid.drain.recut`` whose cost is measured, not assumed."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from actors.mig.backends import DeviceSlice, Lease
from actors.mig.backends.cpu import PARTS, CpuBackend
from actors.mig.hybrid.drain import Drained, RecutOutcome, Refused, recut
from actors.mig.hybrid.load import DiurnalLoad
from apps.migperf.sweep.process import TrialProcess, WorkerSettings
from apps.migperf.sweep.trial import TrialPoint, percentile


@dataclass(frozen=True)
class LiveConfig:
    """A short day on this machine."""

    day_s: float = 40.0
    night_share: float = 0.2
    """Of the peak."""
    peak_utilisation: float = 0.45
    """Peak load over the capacity of the largest serving slice."""
    serve_parts: tuple[int, ...] = (1, 2, 3)
    """Of ``PARTS``; the rest trains."""
    limit_batches: float = 25.0
    """Latency limit in batch times of the largest serving slice; at least ``least_limit_ms``."""
    least_limit_ms: float = 120.0
    serve: str = "minilm"
    train: str = "minilm"
    scale: float = 0.2
    seed: int = 0
    check_s: float = 0.5
    window_s: float = 2.0
    utilisation: float = 0.55


@dataclass(frozen=True)
class Arm:
    """One day with one policy."""

    name: str
    trained: int
    requests: int
    attainment: float
    p99_ms: float
    recuts: int
    recut_s: float
    refused: int = 0


@dataclass(frozen=True)
class Live:
    """All arms; ``gain`` compares the following one with the best static one that keeps the limit as often (nan: none does)."""

    arms: tuple[Arm, ...]
    limit_ms: float
    peak_per_s: float

    @property
    def gain(self) -> float:
        able = [arm for arm in self.arms[1:] if arm.attainment >= min(0.99, self.arms[0].attainment)]
        best = max((arm.trained for arm in able), default=0)
        return self.arms[0].trained / best if best else float("nan")


@dataclass
class _Station:
    """A process that works where its slice is: one step after another while it is told to."""

    process: TrialProcess
    lease: Lease | None = None
    running: bool = False
    work: asyncio.Task[None] | None = None


@dataclass
class _Machine:
    """The device with its two stations, and the queue of requests (their arrival times)."""

    backend: CpuBackend
    server: _Station
    trainer: _Station
    queue: deque[float] = field(default_factory=deque)
    latencies_ms: list[float] = field(default_factory=list)
    trained: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    # ---- stations

    async def serve(self) -> None:
        while self.server.running:
            if not self.queue:
                self.arrived.clear()
                try:
                    await asyncio.wait_for(self.arrived.wait(), 0.1)
                except TimeoutError:
                    continue
            if self.queue and self.server.running:
                arrival = self.queue.popleft()
                await asyncio.to_thread(self._steps, self.server.process, 1)
                self.latencies_ms.append((time.perf_counter() - arrival) * 1e3)

    async def train(self) -> None:
        while self.trainer.running:
            await asyncio.to_thread(self._steps, self.trainer.process, 1)
            self.trained += 1

    @staticmethod
    def _steps(process: TrialProcess, steps: int) -> None:
        process.tell_steps(steps)
        process.finish_steps()

    async def begin(self, station: _Station, found: DeviceSlice) -> None:
        """The station's process goes on in this slice."""
        station.lease = self.backend.lease(found.uuid, station.process.pid)
        station.running = True
        station.work = asyncio.create_task(self.serve() if station is self.server else self.train())

    async def halt(self, station: _Station) -> None:
        """Ends the step under way; the lease goes back."""
        station.running = False
        if station.work is not None:
            await station.work
            station.work = None
        if station.lease is not None:
            self.backend.release(station.lease)
            station.lease = None

    # ---- re-cutting: the machine is its own drainer (its one queue keeps what waits)

    async def drain(self, found: DeviceSlice, deadline_s: float) -> Drained | Refused:
        station = self._at(found)
        if station is None:
            return Drained()
        station.running = False
        if station.work is not None:
            try:
                await asyncio.wait_for(asyncio.shield(station.work), deadline_s)
            except TimeoutError:
                return Refused(f"a step did not end within {deadline_s:g} s")
        return Drained(0)

    async def undrain(self, found: DeviceSlice) -> None:
        station = self._at(found)
        if station is not None and station.work is not None and not station.running:
            station.running = True
            if station.work.done():
                station.work = asyncio.create_task(self.serve() if station is self.server else self.train())

    async def recut_to(self, parts: int) -> RecutOutcome:
        """The server gets ``parts`` of the device, the training the rest."""
        target = [f"cpu{parts}of{PARTS}", f"cpu{PARTS - parts}of{PARTS}"]
        idle = [self.server, self.trainer]

        async def stop(found: DeviceSlice) -> None:
            station = self._at(found)
            if station is not None:
                await self.halt(station)

        async def start(found: DeviceSlice) -> None:
            wanted = self.server if found.profile == target[0] else self.trainer
            if wanted.lease is not None:
                wanted = next(station for station in idle if station.lease is None)
            await self.begin(wanted, found)

        held = self.backend.slices()
        return await recut(self.backend, target, {found.uuid: self for found in held}, stop, start)

    def _at(self, found: DeviceSlice) -> _Station | None:
        for station in (self.server, self.trainer):
            if station.lease is not None and station.lease.slice.uuid == found.uuid:
                return station
        return None


def run_live(config: LiveConfig = LiveConfig(), static: Sequence[int] | None = None) -> Live:
    """The following arm, then each static one, on the same arrivals.

    Args:
        static: parts of the serving slice of each static arm; default: all.

    Raises:
        BackendError: no Linux with what the backend needs.
    """
    backend = CpuBackend()
    settings = WorkerSettings(threads=1)
    try:
        server_point = TrialPoint("cpu", backend.device, "", config.serve, "infer", 1, 32, scale=config.scale)
        train_point = TrialPoint("cpu", backend.device, "", config.train, "train", 4, 32, scale=config.scale)
        # Threads of a step wait for one another across stops and goes: one each.
        with TrialProcess(server_point, _one_thread, settings) as server, TrialProcess(
            train_point, _one_thread, settings
        ) as trainer:  # fmt: skip
            server.wait_ready()
            trainer.wait_ready()
            largest = max(config.serve_parts)
            batch_ms = _batch_ms(backend, server, largest)
            limit_ms = max(config.limit_batches * batch_ms, config.least_limit_ms)
            peak = config.peak_utilisation * 1e3 / batch_ms
            arms = [
                asyncio.run(_day(config, backend, server, trainer, parts, peak, batch_ms, limit_ms))
                for parts in (None, *(static or config.serve_parts))
            ]
    finally:
        backend.close()
    return Live(tuple(arms), limit_ms, peak)


def _one_thread(pid: int) -> Mapping[str, str]:
    return {}


def _batch_ms(backend: CpuBackend, server: TrialProcess, parts: int) -> float:
    backend.repartition([f"cpu{parts}of{PARTS}"])
    lease = backend.lease(backend.slices()[0].uuid, server.pid)
    server.tell_steps(40)
    window = server.finish_steps()
    backend.release(lease)
    return window.mean_ms


async def _day(
    config: LiveConfig,
    backend: CpuBackend,
    server: TrialProcess,
    trainer: TrialProcess,
    static: int | None,
    peak_per_s: float,
    batch_ms: float,
    limit_ms: float,
) -> Arm:
    machine = _Machine(backend, _Station(server), _Station(trainer))
    load = DiurnalLoad(config.night_share * peak_per_s, peak_per_s, config.day_s)
    arrivals = load.arrivals_s(config.seed)
    largest = max(config.serve_parts)
    capacity = {parts: parts / largest * 1e3 / batch_ms for parts in config.serve_parts}
    parts = static or min(config.serve_parts)
    backend.repartition([])
    await machine.recut_to(parts)
    began, recuts, recut_s, refused = time.perf_counter(), 0, 0.0, 0

    async def arrive() -> None:
        for at in arrivals.tolist():
            wait = began + at - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            machine.queue.append(began + at)
            machine.arrived.set()

    arriving = asyncio.create_task(arrive())
    try:
        while (now := time.perf_counter() - began) < config.day_s:
            await asyncio.sleep(min(config.check_s, max(0.0, config.day_s - now)))
            if static is not None:
                continue
            wanted = _parts_for(config, arrivals, time.perf_counter() - began, capacity, parts, len(machine.queue))
            if wanted != parts:
                outcome = await machine.recut_to(wanted)
                if outcome.outcome == "done":
                    parts, recuts, recut_s = wanted, recuts + 1, recut_s + outcome.seconds
                else:
                    refused += 1
        await arriving
        trained = machine.trained
        while machine.queue:
            await asyncio.sleep(0.01)
    finally:
        arriving.cancel()
        await machine.halt(machine.server)
        await machine.halt(machine.trainer)
        backend.repartition([])
    ordered = sorted(machine.latencies_ms)
    kept = float(np.mean(np.array(ordered) <= limit_ms)) if ordered else 1.0
    name = "follows the load" if static is None else f"static: {static} of {PARTS} serve"
    p99 = percentile(ordered, 0.99) if ordered else 0.0
    return Arm(name, trained, len(ordered), kept, p99, recuts, recut_s, refused)


def _parts_for(
    config: LiveConfig, arrivals: np.ndarray, now_s: float, capacity: Mapping[int, float], parts: int, waiting: int
) -> int:
    """From the arrivals of the last window alone: the smallest slice that carries them, with room to come back down."""
    window = min(config.window_s, max(now_s, 0.1))
    seen = int(np.searchsorted(arrivals, now_s) - np.searchsorted(arrivals, now_s - window))
    rate = (seen + waiting) / window + 1.0 * (seen / window**2) ** 0.5
    for wanted in sorted(config.serve_parts):
        room = config.utilisation * (0.85 if wanted < parts else 1.0)
        if rate <= room * capacity[wanted]:
            return wanted
    return max(config.serve_parts)
