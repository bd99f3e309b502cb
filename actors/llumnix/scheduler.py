"""The scheduler actor: a thin shell that holds the cluster's view, asks the policies, and orders migrations.

Serve keeps it as a deployment-scoped actor, so it survives replica restarts; when it is itself restarted, instances register
again at their next push and the view is whole within a heartbeat. Nothing here decides: see ``policy`` and ``view``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from actors.cluster import metrics
from actors.llumnix.load import InstanceLoad
from actors.llumnix.policy.dispatch import NoInstance, make_policy
from actors.llumnix.policy.rebalance import pair
from actors.llumnix.policy.virtual_usage import freeness
from actors.llumnix.ports import DispatchRequest, InstanceInfo, Membership, Placement
from actors.llumnix.settings import SchedulerSettings
from actors.llumnix.view import ClusterView, MigrationOrder, MigrationRecord

logger = logging.getLogger("sextant.llumnix.scheduler")

_instances = metrics.gauge("llumnix", "registered", "instances", help="Instances known to the scheduler.")
_dispatched = metrics.counter("llumnix", "dispatched", "requests", help="Requests placed.", tags=["instance"])
_migrated = metrics.counter("llumnix", "migrated", "requests", help="Migrations that ended.", tags=["outcome"])
_downtime = metrics.histogram(
    "llumnix", "migration_downtime", "milliseconds", buckets=[0.5, 1, 2, 5, 10, 20, 50, 100, 500], help="Pause seen."
)
LOCATE_TIMEOUT_S = 5.0
MEMBERS_WAIT_S = 10.0
"""Longest wait of an ingress's long-poll for a change of the membership."""


SCHEDULER_OPTIONS: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 1000}
"""Ray options of the actor: long-polls and orders are calls that wait."""


class Scheduler:
    """See the module. Async actor; every method runs on one event loop, so the view needs no lock."""

    def __init__(self, settings: SchedulerSettings):
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        self._settings = settings
        self._view = ClusterView(time.monotonic, lambda: time.time_ns() // 1000, settings.history)
        self._dispatch = make_policy(settings.dispatch)
        self._started_at = time.time()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._background: list[asyncio.Task[None]] = []
        self._not_before: dict[str, float] = {}

    async def started_at(self) -> float:
        """Seconds since the epoch; of two schedulers the later one counts."""
        return self._started_at

    # ---- called by instances

    async def register(self, info: InstanceInfo, handle: Any) -> None:
        """An instance joins (or finds that this scheduler has forgotten it)."""
        self._begin()
        if self._view.register(info, handle):
            logger.info("instance %s joined (%d blocks)", info.instance_id, info.total_blocks)
            self._membership_changed()
            self._spawn(self._watch(info.instance_id, handle))

    async def push_load(self, load: InstanceLoad) -> bool:
        """Take a load in; False asks the instance to register."""
        return self._view.push(load)

    async def reclaim(self, request_id: str, failed_epoch: int) -> int | None:
        """The source of a migration with an unknown end goes on under a new epoch; None when it must drop the request."""
        epoch, destination = self._view.reclaim(request_id, failed_epoch)
        if epoch is None:
            return None
        order = self._view.orders.get(failed_epoch)
        revoke_at = (
            [destination] if destination else [i for i in self._view.instance_ids if order is None or i != order.source]
        )
        logger.warning("request %s reclaimed: epoch %d replaces %d", request_id, epoch, failed_epoch)
        for instance_id in revoke_at:
            self._spawn(self._abort_at(instance_id, request_id, failed_epoch))
        return epoch

    # ---- called by ingresses

    async def dispatch(self, request: DispatchRequest) -> Placement | str:
        """Choose an instance and issue an epoch; a string says why none can take the request now."""
        self._begin()
        continued = self._view.known(request.request_id)
        chosen = self._view.near(request.near) if request.near else None
        if chosen is None or chosen in request.exclude:
            try:
                chosen = self._dispatch.choose(self._view.loads(request.exclude), request)
            except NoInstance as error:
                return str(error)
        placement = self._view.place(request, chosen)
        _dispatched.increase(instance=chosen)
        if continued:  # whoever may still run it must stop; the epoch already fences its tokens
            for instance_id in self._view.instance_ids:
                self._spawn(self._abort_at(instance_id, request.request_id, placement.epoch - 1))
        return placement

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests at every instance, under an epoch newer than any order given for them."""
        for request_id in request_ids:
            epoch = self._view.abort(request_id)
            for instance_id in self._view.instance_ids:
                self._spawn(self._abort_at(instance_id, request_id, epoch))

    async def finished(self, request_ids: Sequence[str]) -> None:
        """The ingress has these requests' last tokens."""
        self._view.forget(request_ids)

    async def locate(self, request_ids: Sequence[str]) -> dict[str, str | None]:
        """Instance of each request, None when no live instance has it. What the loads do not show is asked for: a step
        may take long, and only the instance knows what waits for its end."""
        places = {request_id: self._view.locate(request_id) for request_id in request_ids}
        missing = [request_id for request_id, place in places.items() if place is None]
        if missing:
            names = self._view.instance_ids
            for name, held in zip(
                names, await asyncio.gather(*(self._holding(n, missing) for n in names)), strict=True
            ):
                places.update(dict.fromkeys(held, name))
        return places

    async def _holding(self, instance_id: str, request_ids: list[str]) -> list[str]:
        """Which of the requests an instance holds; those dispatched to it when it is too busy to answer."""
        handle = self._view.handle(instance_id)
        if handle is None:
            return []
        try:
            return await asyncio.wait_for(_result(handle.holding.remote(request_ids)), LOCATE_TIMEOUT_S)
        except TimeoutError:
            return [r for r in request_ids if self._view.dispatched_to(r) == instance_id]
        except (RayActorError, ActorUnavailableError, RayTaskError):
            return []

    async def members(self, known_version: int) -> Membership:
        """Long-poll for the membership."""
        if known_version == self._view.version:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), MEMBERS_WAIT_S)
        names = self._view.instance_ids
        infos = {name: info for name in names if (info := self._view.info(name)) is not None}
        return Membership(self._view.version, {name: self._view.handle(name) for name in names}, infos)

    async def migrate(self, request_id: str, destination: str | None = None) -> MigrationRecord | str:
        """Move one request now; waits for the end. A string says why it cannot be ordered."""
        source = (await self.locate([request_id]))[request_id]
        if source is None:
            return f"Request {request_id} is at no instance."
        if destination is None:
            loads = [load for load in self._view.loads([source]) if self._view.may_migrate(source, load.instance_id)]
            if not loads:
                return f"There is no other instance to which request {request_id} could move."
            destination = max(loads, key=freeness).instance_id
        if destination not in self._view.instance_ids:
            return f"There is no instance {destination}; there are {', '.join(self._view.instance_ids)}."
        if destination == source:
            return f"Request {request_id} is already at {destination}."
        if not self._view.may_migrate(source, destination):
            return (
                f"{source} and {destination} compute with different numerics: the request would not go on bit for bit."
            )
        return await self._migrate(self._view.order(request_id, source, destination))

    async def set_policy(self, dispatch: str | None = None, migration: bool | None = None) -> dict[str, Any]:
        """Change the dispatch policy or switch periodic migration on or off; returns both."""
        changes: dict[str, Any] = {}
        if dispatch is not None:
            changes["dispatch"] = dispatch
        if migration is not None:
            changes["migration"] = migration
        self._settings = dataclasses.replace(self._settings, **changes)
        self._dispatch = make_policy(self._settings.dispatch)
        return {"dispatch": self._settings.dispatch, "migration": self._settings.migration}

    # ---- for people

    async def status(self) -> dict[str, Any]:
        """Instances with load and freeness, requests, migrations under way, counts, the newest migrations. JSON-able."""
        instances = []
        for load in self._view.loads():
            info = self._view.info(load.instance_id)
            if info is None:
                continue
            instances.append(
                {
                    "instance_id": load.instance_id,
                    "node_id": info.node_id,
                    "pid": info.pid,
                    "numerics": info.numerics,
                    "max_model_len": info.max_model_len,
                    "total_blocks": load.total_blocks,
                    "used_blocks": load.total_blocks - load.free_blocks,
                    "running": len(load.running),
                    "waiting": len(load.waiting),
                    "freeness": freeness(load),
                    "step_ms": load.step_ms,
                    "preemptions": load.preemptions,
                    "draining": load.draining,
                }
            )
        return {
            "started_at": self._started_at,
            "policy": {"dispatch": self._settings.dispatch, "migration": self._settings.migration},
            "instances": instances,
            "requests": self._view.requests(),
            "migrating": [dataclasses.asdict(order) for order in self._view.orders.values()],
            "migrations": [_record(record) for record in list(self._view.migrations)[-100:]],
            "counts": dict(self._view.counts),
        }

    async def history(self, since: float = 0.0) -> dict[str, Any]:
        """Everything recorded after ``since`` (seconds since the epoch): migrations, placements, load samples. JSON-able."""
        return {
            "migrations": [_record(record) for record in self._view.migrations if record.ended_at > since],
            "placements": [dataclasses.asdict(record) for record in self._view.placements if record.at > since],
            "samples": [dataclasses.asdict(sample) for sample in self._view.samples if sample.at > since],
        }

    # ---- background

    def _begin(self) -> None:
        """Start the periodic tasks at the first call: an actor's constructor has no running loop to put them on."""
        if not self._background:
            for what, work in (("migration", self._migrate_periodically), ("sampling", self._sample_periodically)):
                self._background.append(asyncio.get_running_loop().create_task(self._forever(what, work)))

    async def _watch(self, instance_id: str, handle: Any) -> None:
        """Hear at once when an instance's process ends."""
        while self._view.handle(instance_id) is not None:
            try:
                await handle.wait_for_end.remote()
            except ActorUnavailableError:
                await asyncio.sleep(0.5)  # perhaps only the network
                continue
            except RayActorError as error:
                logger.warning("instance %s died: %s", instance_id, str(error).splitlines()[0])
            except RayTaskError:
                logger.exception("the death watch of instance %s failed", instance_id)
            break
        if self._view.remove(instance_id):
            self._membership_changed()

    async def _migrate_periodically(self) -> None:
        while True:
            await asyncio.sleep(self._settings.interval_ms / 1e3)
            if not self._settings.migration or len(self._view.instance_ids) < 2:
                continue
            busy = [name for name in self._view.instance_ids if self._is_busy(name)]
            compatible = self._view.may_migrate
            for move in pair(self._view.loads(), self._settings.rebalance, busy=busy, compatible=compatible):
                self._spawn(self._migrate(self._view.order(move.request_id, move.source, move.destination)))

    def _is_busy(self, instance_id: str) -> bool:
        under_way = self._view.outgoing(instance_id) + self._view.incoming(instance_id)
        return under_way >= self._settings.max_migrations or time.monotonic() < self._not_before.get(instance_id, 0.0)

    async def _migrate(self, order: MigrationOrder) -> MigrationRecord:
        """Give an order to its source and record how it ended."""
        handle, target = self._view.handle(order.source), self._view.info(order.destination)
        report, outcome = None, "source or destination left"
        if handle is not None and target is not None:
            try:
                reference = handle.migrate_out.remote(order.request_id, target.address, order.epoch)
                report = await asyncio.wait_for(_result(reference), self._settings.order_timeout_s)
                outcome = str(report.outcome)
            except TimeoutError:
                outcome = "the source did not report in time"
            except (RayActorError, ActorUnavailableError):
                outcome = "the source died"
            except RayTaskError as error:
                outcome = f"the source failed: {error.cause}"
                logger.error("migration under epoch %d failed: %s", order.epoch, error)
        committed = report is not None and bool(report.committed)
        record = self._view.order_ended(order, outcome, committed, getattr(report, "request_id", None), report)
        if report is not None and committed:
            _downtime.observe(report.downtime_ms)
        else:
            self._not_before[order.source] = time.monotonic() + self._settings.backoff_s
        _migrated.increase(outcome="committed" if committed else "aborted")
        return record

    async def _sample_periodically(self) -> None:
        while True:
            await asyncio.sleep(self._settings.sample_interval_s)
            self._view.sample(freeness)
            _instances.set(len(self._view.instance_ids))

    async def _abort_at(self, instance_id: str, request_id: str, up_to_epoch: int) -> None:
        handle = self._view.handle(instance_id)
        if handle is not None:
            try:
                await handle.abort.remote(request_id, up_to_epoch)
            except (RayActorError, ActorUnavailableError):
                pass  # its process is gone, and the request with it
            except RayTaskError as error:
                logger.warning("aborting %s at %s failed: %s", request_id, instance_id, error.cause)

    def _membership_changed(self) -> None:
        self._changed.set()
        _instances.set(len(self._view.instance_ids))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a background task of the scheduler failed", exc_info=error)

    async def _forever(self, what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            try:
                await work()
            except Exception:
                logger.exception("the scheduler's %s task failed and begins again", what)
                await asyncio.sleep(1.0)


def _record(record: MigrationRecord) -> dict[str, Any]:
    return dataclasses.asdict(record)


async def _result(reference: Any) -> Any:
    return await reference
