"""What the trainer's controller does about a failure: talks to the master and the keepers, chooses nodes, keeps the times.

Runs inside Ray Train's controller process; ``ray_train.py`` calls it from Ray Train's hooks. Decisions stand in ``placement``,
``failures``, ``parts`` and ``policy``; this shell asks and tells.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.c4.generation import Generation, Worker
from actors.c4.recovery.failures import Cause, Failure
from actors.c4.recovery.keeper import start_keeper
from actors.c4.recovery.memory import REPORTS, STATES
from actors.c4.recovery.outcome import C4Outcome, Event, Phase, restarts_of
from actors.c4.recovery.parts import Choice, PartId, Version, whole_versions
from actors.c4.recovery.placement import NODE_LABEL, NodeRoom, Placement, Suspect, matches, place, workers_that_fit
from actors.c4.recovery.settings import C4Settings
from actors.c4.recovery.tiers import WorkerPlan
from actors.cluster.errors import ClusterError
from actors.cluster.metrics import counter, gauge

logger = logging.getLogger(__name__)

_RESTARTS = counter("c4", "restart", "events", help="Restarts of the worker group.", tags=["cause"])
_RECOVERY = gauge("c4", "recovery", "seconds", help="The newest restart: failure seen to first report.")
_CALL_S = 5.0


class C4Error(ClusterError):
    """Training cannot go on under C4; the text says why and what to do."""


@dataclass(frozen=True)
class RestorePlan:
    """Where a generation's workers find their checkpoint."""

    plans: Mapping[int, WorkerPlan]
    keepers: Mapping[int, Any]
    """By rank: the keeper of the peer node."""


class Supervisor:
    """Of one run. ``master``: the handle of its C4 master (a restarted master answers under the same handle)."""

    def __init__(self, run: str, settings: C4Settings, master: Any):
        self.run, self.settings, self._master = run, settings, master
        self.number = 0
        self.restored_from_memory = False
        self._keepers: dict[str, Any] = {}
        self._announced = True
        self._generation: Generation | None = None
        self._quarantine: dict[str, str] = {}
        self._released: list[tuple[str, str]] = []
        self._events: list[Event] = []
        self._notes: dict[int, dict[str, Any]] = {}
        self._excluded: tuple[str, ...] = ()
        self._restarts = self._without_progress = 0
        self._newest_seen: tuple[Version | None, Version | None] = (None, None)
        self._reported = True

    # ---- before a start -------------------------------------------------------------------------------------------

    def choose_nodes(
        self, num_workers: int, per_worker: Mapping[str, float], selectors: Sequence[Mapping[str, str]] | None
    ) -> tuple[str, ...]:
        """Nodes that the next generation must avoid.

        Raises:
            C4Error: there is no room within the time set, quarantined nodes included.
        """
        deadline = time.monotonic() + self.settings.wait_for_nodes_s
        waiting = False
        while True:
            placement = self._place(num_workers, per_worker, selectors)
            if placement.possible:
                break
            if time.monotonic() > deadline:
                raise C4Error(placement.reason)
            if not waiting:
                logger.warning("%s Waiting up to %.0f s.", placement.reason, self.settings.wait_for_nodes_s)
                waiting = True
            time.sleep(0.25)
        for node_id, reason in placement.released:
            logger.warning("Node %s is taken out of quarantine: %s", node_id[:12], reason)
            self._tell("release", node_id)
            self._quarantine.pop(node_id, None)
        self._released.extend(placement.released)
        self._excluded = placement.excluded
        self._note(Phase.NODES_CHOSEN, ", ".join(node[:12] for node in placement.excluded))
        return placement.excluded

    def usable(self, node_id: str) -> bool:
        """Whether a node is alive and not in quarantine (for elastic sizes)."""
        self._refresh_quarantine()
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return node_id in alive and node_id not in self._quarantine

    # ---- a start --------------------------------------------------------------------------------------------------

    def placed(self, workers: Sequence[tuple[int, str, str, int]]) -> RestorePlan:
        """All workers' processes exist: (rank, node id, node name, pid). Announces the generation, restores checkpoints."""
        self.number += 1
        self._generation = Generation(
            self.number, tuple(Worker(rank, node, name, pid) for rank, node, name, pid in sorted(workers))
        )
        self._note(Phase.WORKERS_PLACED)
        self._announced = False
        self._announce()
        plan = self._restore(self._generation)
        self._note(Phase.CHECKPOINT_READY)
        self._reported = False
        return plan

    def group_ready(self) -> None:
        self._note(Phase.GROUP_READY)

    def training(self) -> None:
        self._note(Phase.TRAINING)

    def polled(self) -> None:
        """Called at every poll: tells the master what it has not heard yet."""
        if not self._announced:
            self._announce()

    @property
    def has_reported(self) -> bool:
        """Whether this generation has reported."""
        return self._reported

    def reported(self) -> None:
        """A report of all ranks was seen."""
        if not self._reported:
            self._reported = True
            self._note(Phase.FIRST_REPORT)
            seen = [event.at_s for event in self._events if event.phase is Phase.FAILURE_SEEN]
            if seen:
                _RECOVERY.set(self._events[-1].at_s - seen[-1])

    # ---- an end ---------------------------------------------------------------------------------------------------

    def failed(self, failure: Failure) -> str | None:
        """A generation failed. Returns None to restart, or the sentence with which the run ends."""
        self._note(Phase.FAILURE_SEEN, f"{failure.cause}: {failure.text}")
        _RESTARTS.increase(cause=str(failure.cause))
        if failure.cause is Cause.LOOP:
            return None  # the user's budget decides
        self._restarts += 1
        limit = self.settings.max_restarts
        if 0 <= limit < self._restarts:
            return f"C4 restarted {limit} times and may not again (C4Settings.max_restarts): {failure.text}"
        if self._progressed():
            self._without_progress = 1
        else:
            self._without_progress += 1
        if self._without_progress > self.settings.max_restarts_without_progress:
            return (
                f"{self.settings.max_restarts_without_progress} restarts in a row brought no new checkpoint: the fault moves "
                f"with the job, so it is probably in the program. Last: {failure.text}"
            )
        if failure.cause is Cause.DEATH:
            self._await_verdict()
        return None

    def fence(self, pids_gone: Callable[[], bool]) -> None:
        """Kills what is left of the generation; ``pids_gone`` says whether every worker is known to be dead."""
        self._tell("end_generation", self.number, "failed")
        if not pids_gone():
            self._tell("request_fence", self.number, "restart")
            deadline = time.monotonic() + 2.0
            while not pids_gone() and time.monotonic() < deadline:
                time.sleep(0.02)
        self._note(Phase.FENCED)

    def ending(self) -> None:
        """All loops have returned; their processes are about to end."""
        self._tell("end_generation", self.number, "finished")

    def group_down(self) -> None:
        self._note(Phase.GROUP_DOWN)

    def finished(self, reason: str) -> None:
        """The run is over, well or not."""
        self._tell("end_generation", self.number, reason)
        self._note(Phase.ENDED, reason)
        forgotten = [keeper.forget.remote() for keeper in self._keepers.values()]
        ray.wait(forgotten, num_returns=len(forgotten), timeout=2.0) if forgotten else None
        for keeper in self._keepers.values():
            ray.kill(keeper)
        self._keepers = {}

    def outcome(self) -> C4Outcome:
        verdicts = self._ask("verdicts", 0) or ()
        return C4Outcome(
            self.run,
            self.number,
            restarts_of(self._events, self._notes),
            tuple(verdicts),
            tuple(self._released),
            tuple(self._events),
        )

    # ---- keepers --------------------------------------------------------------------------------------------------

    def start_keepers(self, per_worker: Mapping[str, float]) -> None:
        """A keeper on every live node that could hold a worker and has none."""
        if not self.settings.checkpoint.memory:
            return
        for node in ray.nodes():
            node_id = node["NodeID"]
            if not node["Alive"]:
                self._keepers.pop(node_id, None)
            elif node_id not in self._keepers and workers_that_fit(node["Resources"], per_worker) > 0:
                checkpoint = self.settings.checkpoint
                self._keepers[node_id] = start_keeper(self.run, checkpoint.memory_dir, node_id, checkpoint.versions)

    # ---- helpers --------------------------------------------------------------------------------------------------

    def _restore(self, generation: Generation) -> RestorePlan:
        checkpoint = self.settings.checkpoint
        nodes = list(generation.nodes)
        reports = states = None
        report_at: dict[str, Any] = {}
        state_at: dict[str, Any] = {}
        if checkpoint.memory and generation.number > 1:
            inventories = self._inventories()
            reports, report_at = self._assemble(
                REPORTS, {node: one.reports for node, one in inventories.items()}, generation
            )
            states, state_at = self._assemble(
                STATES, {node: one.states for node, one in inventories.items()}, generation
            )
        self.restored_from_memory = reports is not None
        self._notes.setdefault(generation.number, {}).update(
            excluded=self._excluded, resumed_from=str(reports.version) if reports else ""
        )
        plans, keepers = {}, {}
        for worker in generation.workers:
            report, state = report_at.get(worker.node_id), state_at.get(worker.node_id)
            state_rank = worker.rank % states.world_size if states else 0
            plans[worker.rank] = WorkerPlan(
                self.run,
                generation.number,
                worker.rank,
                generation.world_size,
                worker.node_id,
                checkpoint,
                state_part=dict(state.parts).get(state_rank, "") if state else "",
                state_from_rank=state_rank,
                state_world_size=states.world_size if states else 0,
                report_folder=report.folder if report else "",
                report_part=dict(report.parts).get(worker.rank, "")
                if report and reports and reports.world_size == generation.world_size
                else "",
            )
            if len(nodes) > 1:
                peer = nodes[(nodes.index(worker.node_id) + 1) % len(nodes)]
                if peer in self._keepers:
                    keepers[worker.rank] = self._keepers[peer]
        return RestorePlan(plans, keepers)

    def _inventories(self) -> dict[str, Any]:
        calls = {keeper.inventory.remote(): node for node, keeper in self._keepers.items()}
        ready, late = ray.wait(list(calls), num_returns=len(calls), timeout=2.0) if calls else ([], [])
        found = {}
        for call in ready:
            try:
                found[calls[call]] = ray.get(call)
            except ray.exceptions.RayError as error:
                logger.info("The keeper of node %s is gone: %s", calls[call][:12], str(error).splitlines()[0])
        for call in late:
            logger.info("The keeper of node %s does not answer.", calls[call][:12])
        return found

    def _assemble(
        self, channel: str, inventories: Mapping[str, Sequence[PartId]], generation: Generation
    ) -> tuple[Choice | None, dict[str, Any]]:
        """The newest whole version of which every node could put its ranks' parts together."""
        for choice in whole_versions(inventories):
            calls = {}
            for node in generation.nodes:
                if node not in self._keepers:
                    self._keepers[node] = start_keeper(
                        self.run, self.settings.checkpoint.memory_dir, node, self.settings.checkpoint.versions
                    )
                ranks = tuple(range(choice.world_size))
                if channel == STATES:
                    ranks = tuple(sorted({worker.rank % choice.world_size for worker in generation.on_node(node)}))
                calls[node] = self._keepers[node].assemble.remote(channel, choice, ranks, self._keepers)
            try:
                return choice, {node: ray.get(call, timeout=60) for node, call in calls.items()}
            except Exception as error:  # a damaged part, a keeper that died meanwhile: an older version may be whole
                logger.warning("Version %s cannot be put together: %s", choice.version, str(error).splitlines()[-1])
        return None, {}

    def _progressed(self) -> bool:
        inventories = self._inventories()
        newest = tuple(
            next((choice.version for choice in whole_versions(parts)), None)
            for parts in (
                {node: one.reports for node, one in inventories.items()},
                {node: one.states for node, one in inventories.items()},
            )
        )
        progressed = newest != self._newest_seen
        self._newest_seen = newest  # type: ignore[assignment]
        return progressed

    def _place(
        self, num_workers: int, per_worker: Mapping[str, float], selectors: Sequence[Mapping[str, str]] | None
    ) -> Placement:
        self._refresh_quarantine()
        wanted = [dict(selector) for selector in selectors or [{}]]
        rooms = [
            NodeRoom(node["NodeID"], workers_that_fit(node["Resources"], per_worker))
            for node in ray.nodes()
            if node["Alive"]
            and any(matches({**node.get("Labels", {}), NODE_LABEL: node["NodeID"]}, one) for one in wanted)
        ]
        suspects = [
            Suspect(node_id, reason, 1, whole_node="node" in reason) for node_id, reason in self._quarantine.items()
        ]
        return place(rooms, suspects, num_workers)

    def _await_verdict(self) -> None:
        """A death was seen by Ray first: the master's verdict, and with it the quarantine, follows in a moment."""
        self._refresh_quarantine()
        known = set(self._quarantine)
        deadline = time.monotonic() + self.settings.verdict_wait_s
        while time.monotonic() < deadline:
            verdicts = self._ask("verdicts", 0)
            if verdicts is None or any(entry.generation == self.number for entry in verdicts):
                break
            if set(self._quarantine) != known:
                break
            time.sleep(0.05)

    def _refresh_quarantine(self) -> None:
        quarantine = self._ask("quarantine")
        if quarantine is not None:
            self._quarantine = dict(quarantine)

    def _announce(self) -> None:
        self._announced = self._tell("begin_generation", self._generation)

    def _tell(self, method: str, *arguments: Any) -> bool:
        return self._call(method, *arguments)[0]

    def _ask(self, method: str, *arguments: Any) -> Any:
        return self._call(method, *arguments)[1]

    def _call(self, method: str, *arguments: Any) -> tuple[bool, Any]:
        """A call to the master; a master that is away is logged, never waited for long."""
        try:
            return True, ray.get(getattr(self._master, method).remote(*arguments), timeout=_CALL_S)
        except (ray.exceptions.RayError, ValueError) as error:
            logger.warning(
                "The master does not answer (%s): %s", method, str(error).splitlines()[0] if str(error) else error
            )
            return False, None

    def _note(self, phase: Phase, detail: str = "") -> None:
        self._events.append(Event(time.time(), self.number, phase, detail))
