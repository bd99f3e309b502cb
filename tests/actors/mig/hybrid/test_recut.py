"""Re-cutting while work runs: drained first, refused or timed out leaves everything as it was, failures go back."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import pytest

from actors.llumnix.load import InstanceLoad, RequestLoad
from actors.mig.backends import BackendError, DeviceSlice
from actors.mig.backends.simulated import SimBackend
from actors.mig.hybrid.drain import Drained, Refused, recut
from actors.mig.hybrid.llumnix import LlumnixDrainer


@dataclass
class World:
    """A device with work on every slice; notes what happens in what order."""

    backend: SimBackend
    notes: list[str] = field(default_factory=list)
    leases: dict[str, object] = field(default_factory=dict)

    async def start(self, found: DeviceSlice) -> None:
        self.notes.append(f"start {found.profile}")
        self.leases[found.uuid] = self.backend.lease(found.uuid, 1)

    async def stop(self, found: DeviceSlice) -> None:
        self.notes.append(f"stop {found.profile}")
        self.backend.release(self.leases.pop(found.uuid))

    def profiles(self) -> Counter[str]:
        return Counter(found.profile for found in self.backend.slices())


class Drainer:
    """A drainer whose answer is set; ``seconds`` None: it never answers."""

    def __init__(self, world: World, answer: Drained | Refused | Exception = Drained(2), seconds: float | None = 0.0):
        self.world, self.answer, self.seconds = world, answer, seconds

    async def drain(self, found: DeviceSlice, deadline_s: float) -> Drained | Refused:
        self.world.notes.append(f"drain {found.profile}")
        await asyncio.sleep(3600 if self.seconds is None else self.seconds)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def undrain(self, found: DeviceSlice) -> None:
        self.world.notes.append(f"undrain {found.profile}")


async def working(layout: tuple[str, ...]) -> World:
    world = World(SimBackend("A100-80GB"))
    world.backend.repartition(layout)
    for found in world.backend.slices():
        await world.start(found)
    world.notes.clear()
    return world


def all_drained_by(world: World, **other: Drainer) -> dict[str, Drainer]:
    by_profile = {name.replace("_", "."): drainer for name, drainer in other.items()}
    return {
        found.uuid: by_profile.get("p" + found.profile, Drainer(world)) for found in world.backend.slices()
    }  # fmt: skip


async def test_slices_are_drained_before_they_are_stopped_and_stopped_before_they_are_cut() -> None:
    world = await working(("4g.40gb", "3g.40gb"))
    outcome = await recut(
        world.backend, ["4g.40gb", "2g.20gb", "1g.10gb"], all_drained_by(world), world.stop, world.start
    )
    assert (outcome.outcome, outcome.moved, outcome.steps) == ("done", 2, 3)
    assert world.notes[:2] == ["drain 3g.40gb", "stop 3g.40gb"]
    assert sorted(world.notes[2:]) == ["start 1g.10gb", "start 2g.20gb"]  # 4g.40gb was not touched
    assert len(world.leases) == 3


@pytest.mark.parametrize(
    ("answer", "seconds", "sentence"),
    [
        (Refused("a request is pinned"), 0.0, "3g.40gb: a request is pinned"),
        (Drained(), None, "not drained within 0.05 s"),
        (RuntimeError("scheduler gone"), 0.0, "the drainer failed (RuntimeError: scheduler gone)"),
    ],
)
async def test_a_drainer_that_refuses_hangs_or_fails_leaves_everything_as_it_was(
    answer, seconds, sentence: str
) -> None:
    world = await working(("4g.40gb", "3g.40gb"))
    before = world.backend.slices()
    drainers = all_drained_by(world, p3g_40gb=Drainer(world, answer, seconds))
    outcome = await recut(world.backend, ["7g.80gb"], drainers, world.stop, world.start, deadline_s=0.05)
    assert outcome.outcome == "refused"
    assert sentence in outcome.why
    assert world.backend.slices() == before
    assert len(world.leases) == 2
    assert not [note for note in world.notes if note.startswith(("stop", "start"))]
    # The one that had drained well works again too.
    assert sorted(note for note in world.notes if note.startswith("undrain")) == ["undrain 3g.40gb", "undrain 4g.40gb"]


async def test_what_cannot_be_cut_is_refused_before_anything_is_drained() -> None:
    world = await working(("4g.40gb",))
    outcome = await recut(world.backend, ["4g.40gb", "4g.40gb"], all_drained_by(world), world.stop, world.start)
    assert (outcome.outcome, world.notes) == ("refused", [])
    same = await recut(world.backend, ["4g.40gb"], all_drained_by(world), world.stop, world.start)
    assert (same.outcome, world.notes) == ("nothing to do", [])


async def test_a_cut_that_fails_brings_the_work_back(monkeypatch) -> None:
    world = await working(("4g.40gb", "3g.40gb"))

    def fail(profiles):
        raise BackendError("the driver says no")

    monkeypatch.setattr(world.backend, "repartition", fail)
    outcome = await recut(world.backend, ["7g.80gb"], all_drained_by(world), world.stop, world.start)
    assert (outcome.outcome, outcome.why) == ("failed", "the driver says no")
    assert world.profiles() == Counter(["4g.40gb", "3g.40gb"])
    assert len(world.leases) == 2
    assert sum(note.startswith("undrain") for note in world.notes) == 2


class Remote:
    """A method of an actor's handle."""

    def __init__(self, function):
        self.remote = function


class Instance:
    """An engine actor of Llumnix: while it drains, each look finds one request less (``stuck`` ones never leave)."""

    def __init__(self, requests: int, stuck: int = 0):
        self.requests, self.stuck, self.draining = requests, stuck, False
        self.drain, self.load = Remote(self._drain), Remote(self._load)

    async def _drain(self, draining: bool) -> None:
        self.draining = draining

    async def _load(self) -> InstanceLoad:
        running = tuple(RequestLoad(str(n), 1, 0, 10, 0.0) for n in range(self.requests + self.stuck))
        if self.draining and self.requests:
            self.requests -= 1
        return InstanceLoad("a", 1, 100, 50, 16, running, (), draining=self.draining)


async def test_llumnix_empties_the_instance_before_its_slice_goes() -> None:
    world = await working(("4g.40gb", "3g.40gb"))
    instances = {found.uuid: Instance(5) for found in world.backend.slices()}
    drainer = LlumnixDrainer(instances, poll_s=0.001)
    outcome = await recut(
        world.backend, ["7g.80gb"], dict.fromkeys(instances, drainer), world.stop, world.start, deadline_s=5
    )
    assert (outcome.outcome, outcome.moved) == ("done", 10)
    assert all(instance.draining and instance.requests == 0 for instance in instances.values())


async def test_llumnix_refuses_when_requests_cannot_leave_and_takes_new_ones_again() -> None:
    world = await working(("7g.80gb",))
    (found,) = world.backend.slices()
    instance = Instance(1, stuck=2)
    drainer = LlumnixDrainer({found.uuid: instance}, poll_s=0.001)
    outcome = await recut(world.backend, ["1g.10gb"], {found.uuid: drainer}, world.stop, world.start, deadline_s=0.05)
    assert outcome.outcome == "refused"
    assert "2 requests could not migrate within 0.05 s" in outcome.why
    assert not instance.draining
    assert isinstance(await LlumnixDrainer({}).drain(found, 1.0), Refused)


def test_llumnix_instances_have_what_the_drainer_calls() -> None:
    from actors.llumnix.instance import EngineActor

    assert asyncio.iscoroutinefunction(EngineActor.drain)
    assert asyncio.iscoroutinefunction(EngineActor.load)
