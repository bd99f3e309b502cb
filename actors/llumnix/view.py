"""The scheduler's view of the cluster: instances, their loads, where requests are, epochs, migrations. Pure state, no Ray.

The view may be lost at any time (the scheduler restarts): instances register again, and everything that correctness needs
is in the epochs, which are issued from the clock and therefore never repeat.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from actors.llumnix.load import InstanceLoad, RequestLoad
from actors.llumnix.ports import DispatchRequest, InstanceInfo, Placement

PENDING_S = 5.0
"""A dispatched request counts at its instance until that instance's load shows it, at most so long."""


@dataclass(frozen=True)
class MigrationOrder:
    """One migration under way. ``request_id`` is None while the source chooses."""

    request_id: str | None
    source: str
    destination: str
    epoch: int
    ordered_at: float
    """Seconds since the epoch."""


@dataclass(frozen=True)
class MigrationRecord:
    """A migration that has ended."""

    request_id: str | None
    source: str
    destination: str
    epoch: int
    ordered_at: float
    ended_at: float
    outcome: str
    committed: bool
    report: Any = None
    """``migration.MigrationReport`` of the source, None when it could not give one."""


@dataclass(frozen=True)
class PlacementRecord:
    """From ``at`` (seconds since the epoch) on, the request is at ``instance_id`` (None: it has ended)."""

    at: float
    request_id: str
    instance_id: str | None
    cause: str


@dataclass(frozen=True)
class LoadSample:
    """One instance's load at ``at`` (seconds since the epoch), for reports."""

    at: float
    instance_id: str
    used_blocks: int
    total_blocks: int
    running: int
    waiting: int
    freeness: float
    step_ms: float
    preemptions: int


@dataclass
class _Instance:
    info: InstanceInfo
    handle: Any
    load: InstanceLoad | None = None
    heard_at: float = 0.0
    requests: frozenset[str] = frozenset()
    handing_over: frozenset[str] = frozenset()


@dataclass
class _Request:
    """What is known of a request since its dispatch; lost with the view."""

    instance_id: str
    epoch: int
    load: RequestLoad
    pending_since: float | None
    """Monotonic; None once the instance's load showed it."""
    migrations: int = 0
    priority: int = 0


class ClusterView:
    """See the module. ``monotonic`` and ``wall_us`` are the clocks (seconds; microseconds since the epoch:
    so that epochs stay below 2**53 and survive JSON and floats exactly)."""

    def __init__(self, monotonic: Callable[[], float], wall_us: Callable[[], int], history: int = 10_000):
        self._monotonic, self._wall_us = monotonic, wall_us
        self._last_epoch = 0
        self.version = 0
        """Grows whenever an instance joins or leaves."""
        self._instances: dict[str, _Instance] = {}
        self._requests: dict[str, _Request] = {}
        self._aborted: dict[str, int] = {}
        self.orders: dict[int, MigrationOrder] = {}
        self.migrations: deque[MigrationRecord] = deque(maxlen=history)
        self.placements: deque[PlacementRecord] = deque(maxlen=10 * history)
        self.samples: deque[LoadSample] = deque(maxlen=10 * history)
        self.counts = {"dispatched": 0, "recovered": 0, "migrated": 0, "migration_failures": 0, "aborted": 0}

    # ---- epochs

    def issue_epoch(self) -> int:
        """A fencing epoch larger than every one issued before, also by an earlier scheduler (clocks permitting)."""
        self._last_epoch = max(self._last_epoch + 1, self._wall_us())
        return self._last_epoch

    def note_epoch(self, epoch: int) -> None:
        """An epoch seen in use: later ones must be larger."""
        self._last_epoch = max(self._last_epoch, epoch)

    # ---- instances

    def register(self, info: InstanceInfo, handle: Any) -> bool:
        """An instance joins, or says again that it is there; True when it is new."""
        known = self._instances.get(info.instance_id)
        if known is not None:
            known.info, known.handle, known.heard_at = info, handle, self._monotonic()
            return False
        self._instances[info.instance_id] = _Instance(info, handle, heard_at=self._monotonic())
        self.version += 1
        return True

    def remove(self, instance_id: str) -> bool:
        """An instance is gone; True when it was known. Its requests stay known, at no instance."""
        if self._instances.pop(instance_id, None) is None:
            return False
        self.version += 1
        return True

    def push(self, load: InstanceLoad) -> bool:
        """Take a load in; False when the instance is unknown (it must register). An older step never replaces a newer."""
        instance = self._instances.get(load.instance_id)
        if instance is None:
            return False
        instance.heard_at = self._monotonic()
        if instance.load is not None and load.step < instance.load.step:
            return True
        instance.load = load
        instance.requests = frozenset(r.request_id for r in (*load.running, *load.waiting))
        instance.handing_over = frozenset(load.migrating)
        for request_id in instance.requests:
            request = self._requests.get(request_id)
            if request is not None and request.instance_id == load.instance_id:
                request.pending_since = None
        return True

    @property
    def instance_ids(self) -> list[str]:
        return list(self._instances)

    def info(self, instance_id: str) -> InstanceInfo | None:
        """What an instance said of itself, None when it is unknown."""
        instance = self._instances.get(instance_id)
        return instance.info if instance else None

    def handle(self, instance_id: str) -> Any:
        """The handle an instance registered with, None when it is unknown."""
        instance = self._instances.get(instance_id)
        return instance.handle if instance else None

    def silent(self, longer_than_s: float) -> list[str]:
        """Instances that have not been heard of for so long."""
        now = self._monotonic()
        return [name for name, instance in self._instances.items() if now - instance.heard_at > longer_than_s]

    def loads(self, exclude: Iterable[str] = ()) -> list[InstanceLoad]:
        """The newest load of each instance; requests dispatched since then count as waiting at the end of its line."""
        now, skip = self._monotonic(), set(exclude)
        pending: dict[str, list[RequestLoad]] = {}
        for request in self._requests.values():
            if request.pending_since is not None:
                if now - request.pending_since > PENDING_S:
                    request.pending_since = None  # it ended before any load showed it
                else:
                    pending.setdefault(request.instance_id, []).append(request.load)
        loads = []
        for name, instance in self._instances.items():
            if name in skip:
                continue
            load = instance.load or self._empty_load(instance.info)
            loads.append(dataclasses.replace(load, waiting=(*load.waiting, *pending.get(name, ()))))
        return loads

    @staticmethod
    def _empty_load(info: InstanceInfo) -> InstanceLoad:
        return InstanceLoad(info.instance_id, -1, info.total_blocks, info.total_blocks, info.block_size, (), ())

    # ---- requests

    def place(self, request: DispatchRequest, instance_id: str) -> Placement:
        """Record that ``request`` goes to ``instance_id`` and issue its epoch."""
        instance, epoch = self._instances[instance_id], self.issue_epoch()
        known = self._requests.get(request.request_id)
        blocks = -(-(request.tokens + 1) // instance.info.block_size)
        load = RequestLoad(
            request.request_id, blocks, request.priority, request.tokens, request.arrival_time, prefilled=False
        )
        self._requests[request.request_id] = _Request(
            instance_id, epoch, load, self._monotonic(), known.migrations if known else 0, request.priority
        )
        self.counts["recovered" if known else "dispatched"] += 1
        self._note_place(request.request_id, instance_id, "recovery" if known else "dispatch")
        return Placement(instance_id, epoch)

    def near(self, request_id: str) -> str | None:
        """Instance of a request placed before, if it is still there."""
        known = self._requests.get(request_id)
        return known.instance_id if known is not None and known.instance_id in self._instances else None

    def dispatched_to(self, request_id: str) -> str | None:
        """Instance to which this view last knows the request to have gone, alive or not."""
        known = self._requests.get(request_id)
        return known.instance_id if known is not None else None

    def known(self, request_id: str) -> bool:
        """Whether the request was dispatched through this view and has not ended."""
        return request_id in self._requests

    def forget(self, request_ids: Sequence[str]) -> None:
        """The requests have ended."""
        for request_id in request_ids:
            if self._requests.pop(request_id, None) is not None:
                self._note_place(request_id, None, "end")

    def abort(self, request_id: str) -> int:
        """The request is to be dropped everywhere; returns the epoch up to which every owner is fenced."""
        epoch = self.issue_epoch()
        self._aborted[request_id] = epoch
        while len(self._aborted) > 10_000:
            del self._aborted[next(iter(self._aborted))]
        self.counts["aborted"] += 1
        self.forget([request_id])
        return epoch

    def locate(self, request_id: str) -> str | None:
        """Instance that has the request, or is about to receive it; None when no live instance has it."""
        for name, instance in self._instances.items():
            if request_id in instance.requests:
                return name
        for name, instance in self._instances.items():
            if request_id in instance.handing_over:
                return name
        for order in self.orders.values():
            if order.request_id == request_id and order.source in self._instances:
                return order.source
        known = self._requests.get(request_id)
        if known is None or known.pending_since is None or known.instance_id not in self._instances:
            return None
        return known.instance_id if self._monotonic() - known.pending_since <= PENDING_S else None

    # ---- migrations

    def may_migrate(self, source: str, destination: str) -> bool:
        """Whether a request of ``source`` can go on bit for bit at ``destination``."""
        one, other = self.info(source), self.info(destination)
        return (
            one is not None
            and other is not None
            and source != destination
            and one.address is not None
            and other.address is not None
            and (one.numerics, one.block_size) == (other.numerics, other.block_size)
        )

    def outgoing(self, instance_id: str) -> int:
        """Migrations under way out of an instance."""
        return sum(order.source == instance_id for order in self.orders.values())

    def incoming(self, instance_id: str) -> int:
        """Migrations under way into an instance."""
        return sum(order.destination == instance_id for order in self.orders.values())

    def order(self, request_id: str | None, source: str, destination: str) -> MigrationOrder:
        """Record a migration under a fresh epoch."""
        order = MigrationOrder(request_id, source, destination, self.issue_epoch(), self._wall_us() / 1e6)
        self.orders[order.epoch] = order
        return order

    def order_ended(
        self, order: MigrationOrder, outcome: str, committed: bool, request_id: str | None, report: Any = None
    ) -> MigrationRecord:
        """A migration has ended in whatever way."""
        self.orders.pop(order.epoch, None)
        record = MigrationRecord(
            request_id=request_id or order.request_id,
            source=order.source,
            destination=order.destination,
            epoch=order.epoch,
            ordered_at=order.ordered_at,
            ended_at=self._wall_us() / 1e6,
            outcome=outcome,
            committed=committed,
            report=report,
        )
        self.migrations.append(record)
        self.counts["migrated" if committed else "migration_failures"] += 1
        request = self._requests.get(record.request_id or "")
        if committed and record.request_id is not None and (request is None or request.epoch < order.epoch):
            self._note_place(record.request_id, order.destination, "migration")
            if request is not None:
                request.instance_id, request.epoch = order.destination, order.epoch
                request.pending_since = self._monotonic()
                request.migrations += 1
        return record

    def reclaim(self, request_id: str, failed_epoch: int) -> tuple[int | None, str | None]:
        """The source of a migration whose end is unknown asks to go on. Returns (new epoch, instance at which everything up
        to ``failed_epoch`` must be revoked; None: unknown, so everywhere else). The epoch is None when the request was
        aborted or has a newer owner: then the source drops it."""
        self.note_epoch(failed_epoch)
        if request_id in self._aborted:
            return None, None
        known = self._requests.get(request_id)
        if known is not None and known.epoch > failed_epoch:
            return None, None
        order = self.orders.get(failed_epoch)
        epoch = self.issue_epoch()
        if known is not None:
            known.epoch = epoch
        return epoch, order.destination if order else None

    # ---- history

    def sample(self, freeness: Callable[[InstanceLoad], float]) -> None:
        """Record every instance's load for reports."""
        at = self._wall_us() / 1e6
        for load in self.loads():
            self.samples.append(
                LoadSample(
                    at=at,
                    instance_id=load.instance_id,
                    used_blocks=load.total_blocks - load.free_blocks,
                    total_blocks=load.total_blocks,
                    running=len(load.running),
                    waiting=len(load.waiting),
                    freeness=freeness(load),
                    step_ms=load.step_ms,
                    preemptions=load.preemptions,
                )
            )

    def requests(self) -> list[dict[str, Any]]:
        """Every request that has not ended: id, instance, epoch, priority, migrations."""
        return [
            {
                "request_id": request_id,
                "instance_id": self.locate(request_id) or request.instance_id,
                "epoch": request.epoch,
                "priority": request.priority,
                "migrations": request.migrations,
                "prompt_tokens": request.load.tokens,
                "arrival_time": request.load.arrival_time,
            }
            for request_id, request in self._requests.items()
        ]

    def _note_place(self, request_id: str, instance_id: str | None, cause: str) -> None:
        self.placements.append(PlacementRecord(self._wall_us() / 1e6, request_id, instance_id, cause))
