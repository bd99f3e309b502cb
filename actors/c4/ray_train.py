"""The one door to Ray Train's internals (Ray 2.60): its controller and worker group, with C4's recovery in their hooks.

Nothing else in Sextant imports ``ray.train.v2._internal`` (the door's other leaves are ``ray_train_worker.py`` and
``ray_train_helpers.py``).
``verify`` names what a new Ray has moved; the trainer calls it first, and tests/actors/c4/recovery/test_ray_train.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, ReportCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import create_scaling_policy
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group import worker_group as worker_group_module
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from actors.c4.ray_prestart import WarmProcesses, own_environment
from actors.c4.ray_train_helpers import LATER_S, C4CheckpointManager, LatePreemption, SpareSynchronization
from actors.c4.ray_train_worker import C4WorkerCallback
from actors.c4.recovery.failures import Cause, Failure, classify, needs_a_closer_look
from actors.c4.recovery.outcome import C4Outcome
from actors.c4.recovery.placement import excluding
from actors.c4.recovery.supervisor import C4Error, Supervisor

logger = logging.getLogger(__name__)

_CLOSER_LOOK_S = 0.5

_INTERNALS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("execution.controller", "TrainController._start_worker_group", ("num_workers", "resources_per_worker")),
    ("execution.controller", "TrainController._build_result", ()),
    ("execution.worker_group", "WorkerGroup._create_placement_group", ("scaling_config", "worker_group_context")),
    ("execution.worker_group", "WorkerGroup.poll_status", ("timeout",)),
    ("execution.worker_group", "WorkerGroup.shutdown", ()),
    ("execution.worker_group.worker_group", "SynchronizationActor", ()),
    ("execution.callback", "WorkerGroupCallback.before_init_train_context", ("workers",)),
    ("execution.callback", "WorkerGroupCallback.after_worker_group_start", ("worker_group",)),
    ("execution.callback", "WorkerGroupCallback.after_worker_group_training_start", ("worker_group",)),
    ("execution.callback", "ControllerCallback.on_controller_start_worker_group", ("scaling_config", "num_workers")),
    ("execution.callback", "ReportCallback.after_report", ("training_report", "metrics")),
    ("execution.callback", "WorkerCallback.after_init_train_context", ()),
    ("execution.checkpoint.checkpoint_manager", "CheckpointManager._write_state_to_storage", ()),
    ("execution.checkpoint.checkpoint_manager", "CheckpointManager._save_state_and_delete_old_checkpoints", ()),
    ("execution.checkpoint.checkpoint_manager", "CheckpointManager.before_init_train_context", ("workers",)),
    ("execution.context", "TrainContext.report", ("metrics", "checkpoint", "checkpoint_dir_name", "checkpoint_upload_mode")),
    ("execution.context", "TrainContext._sync_checkpoint_dir_name_across_ranks", ("checkpoint_dir_name",)),
    ("execution.context", "TrainContext.get_checkpoint", ()),
    ("execution.storage", "StorageContext.persist_current_checkpoint", ("checkpoint", "checkpoint_dir_name")),
    ("execution.failure_handling", "FailurePolicy.make_decision", ("training_failed_error",)),
    ("execution.scaling_policy.elastic", "ElasticScalingPolicy._count_possible_workers", ("reserved_resources",)),
    ("callbacks.preemption_callback", "PreemptionCallback.after_worker_group_start", ("worker_group",)),
)  # fmt: skip


def verify() -> None:
    """Checks that Ray Train still has what this door uses.

    Raises:
        C4Error: a sentence that names what moved.
    """
    for module_name, path, parameters in _INTERNALS:
        full = f"ray.train.v2._internal.{module_name}"
        try:
            found: Any = importlib.import_module(full)
            for name in path.split("."):
                found = getattr(found, name)
            missing = [name for name in parameters if name not in inspect.signature(found).parameters]
        except (ImportError, AttributeError) as error:
            raise C4Error(
                f"Ray {ray.__version__} has no {full}.{path} any more (C4 was written for Ray 2.60): "
                f"actors/c4/ray_train.py must be adapted. {error}"
            ) from error
        if missing:
            raise C4Error(
                f"{full}.{path} of Ray {ray.__version__} has no parameter {', '.join(missing)} (C4 was written for Ray 2.60): "
                "actors/c4/ray_train.py must be adapted."
            )


class C4WorkerGroup(WorkerGroup):
    """Kept off nodes in quarantine; a failed group is fenced before Ray Train lets go of it."""

    supervisor: Supervisor  # of the one controller in this process

    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> Any:
        selectors = worker_group_context.label_selector
        excluded = self.supervisor.choose_nodes(
            worker_group_context.num_workers, worker_group_context.resources_per_worker, selectors
        )
        if excluded:
            merged = [
                excluding(selector, excluded) for selector in selectors or [{}] * worker_group_context.num_workers
            ]
            worker_group_context = dataclasses.replace(worker_group_context, label_selector=merged)
        return super()._create_placement_group(scaling_config, worker_group_context)

    def poll_status(self, timeout: float | None = None) -> Any:
        status = super().poll_status(timeout)
        # An echo (a closed connection) may be seen before what it echoes: look again for a moment.
        until = time.monotonic() + _CLOSER_LOOK_S
        while needs_a_closer_look(*split_errors(status.errors)) and time.monotonic() < until:
            time.sleep(0.05)
            status = super().poll_status(timeout)
        return status

    def shutdown(self) -> None:
        status = self.get_latest_poll_status()
        if status is not None and status.finished and not status.errors:
            self.supervisor.ending()  # before the processes go: their end is no fault
        else:
            self._fence()
        super().shutdown()
        self.supervisor.group_down()

    def _fence(self) -> None:
        """No process of this generation may live on: kill by actor, and by process id where a process does not listen."""
        workers = self.get_workers()
        for worker in workers:
            ray.kill(worker.actor)
        probes: list[Any] = [worker.actor.get_metadata.remote() for worker in workers]

        def gone() -> bool:
            ready, alive = ray.wait(probes, num_returns=len(probes), timeout=0.2)
            return not alive

        self.supervisor.fence(gone)


class C4FailurePolicy(FailurePolicy):
    """The loop's errors count in the user's ``FailureConfig``; faults that C4 handles do not."""

    def __init__(self, users: FailurePolicy, supervisor: Supervisor):
        super().__init__(users.failure_config)
        self._users, self._supervisor = users, supervisor

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if not isinstance(training_failed_error, WorkerGroupError):
            if isinstance(getattr(training_failed_error, "controller_failure", None), C4Error):
                return FailureDecision.RAISE
            decision = self._users.make_decision(training_failed_error)
            if decision == FailureDecision.RETRY:
                self._supervisor.failed(Failure(Cause.START, (), str(training_failed_error).splitlines()[0]))
            return decision
        raised, died = split_errors(training_failed_error.worker_failures)
        failure = classify(raised, died)
        give_up = self._supervisor.failed(failure)
        if failure.cause is Cause.LOOP:
            _cause_first(training_failed_error, failure)
            return self._users.make_decision(training_failed_error)
        logger.warning(
            "%s: %s", "C4 restarts the workers" if give_up is None else "C4 gives up", give_up or failure.text
        )
        if give_up is not None:
            training_failed_error.args = (f"{give_up}\n{training_failed_error}",)
            return FailureDecision.RAISE
        return FailureDecision.RETRY


class C4ElasticPolicy(ElasticScalingPolicy):
    """Counts only workers that fit on live nodes outside quarantine."""

    supervisor: Supervisor

    def _count_possible_workers(self, reserved_resources: Mapping[str, Any]) -> int:
        usable = {node: amount for node, amount in reserved_resources.items() if self.supervisor.usable(node)}
        return super()._count_possible_workers(usable)


class _SupervisorCallback(ControllerCallback, WorkerGroupCallback, ReportCallback):
    """Hands Ray Train's moments to the supervisor."""

    def __init__(self, supervisor: Supervisor, to_workers: C4WorkerCallback, per_worker: Mapping[str, float]):
        self._supervisor, self._to_workers, self._per_worker = supervisor, to_workers, per_worker
        self._later: list[Callable[[], None]] = []
        self._first_report_at = float("inf")
        self.warm: WarmProcesses | None = None
        self.spare_sync: SpareSynchronization | None = None

    def after_controller_start(self, train_run_context: Any) -> None:
        self._supervisor.start_keepers(self._per_worker)

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        places = [
            (
                worker.distributed_context.world_rank,
                worker.metadata.node_id,
                f"{worker.metadata.node_ip}/{worker.metadata.node_id[:8]}",
                worker.metadata.pid,
            )
            for worker in workers
        ]
        restore = self._supervisor.placed(places)
        self._to_workers.plans, self._to_workers.keepers = restore.plans, restore.keepers
        self._to_workers.environment = {
            **self._to_workers.environment,
            "SEXTANT_C4_GENERATION": str(self._supervisor.number),
        }
        self._first_report_at = float("inf")
        return {}

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._supervisor.group_ready()  # the process group was made by an earlier callback

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._supervisor.training()
        nodes = [worker.metadata.node_id for worker in worker_group.get_workers()]
        if self.warm is not None:
            if not self.warm.knows_environment:
                self.warm.environment(worker_group.execute_single(0, own_environment))
            self.warm.used(nodes)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        self._supervisor.polled()
        if time.monotonic() - self._first_report_at > LATER_S:
            self._first_report_at = float("inf")
            self._supervisor.start_keepers(self._per_worker)
            for later in (self.warm and self.warm.fill, self.spare_sync and self.spare_sync.fill):
                if later:
                    later()

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        if self._first_report_at == float("inf") and not self._supervisor.has_reported:
            self._first_report_at = time.monotonic()
        self._supervisor.reported()

    def after_controller_finish(self, result: Any) -> None:
        self._supervisor.finished("finished" if result.error is None else "failed")

    def before_controller_abort(self) -> None:
        self._supervisor.finished("aborted")


class C4Controller(TrainController):
    """Ray Train's controller with C4's worker group, failure policy and callbacks."""

    worker_group_cls = C4WorkerGroup

    def __init__(
        self,
        *,
        supervisor: Supervisor,
        to_workers: C4WorkerCallback,
        keep_warm: bool,
        **controller: Any,
    ):
        scaling = controller["train_run_context"].scaling_config
        per_worker = scaling._resources_per_worker_not_none
        callback = _SupervisorCallback(supervisor, to_workers, per_worker)
        if keep_warm:
            callback.warm = WarmProcesses(per_worker)
        callback.spare_sync = SpareSynchronization()
        setattr(worker_group_module, "SynchronizationActor", callback.spare_sync)  # noqa: B010 - in this controller's process only
        C4WorkerGroup.supervisor = supervisor
        controller["callbacks"] = [*controller["callbacks"], callback, to_workers]
        controller["failure_policy"] = C4FailurePolicy(controller["failure_policy"], supervisor)
        if scaling.elasticity_enabled:
            controller["scaling_policy"] = C4ElasticPolicy(scaling)
            controller["scaling_policy"].supervisor = supervisor
        else:
            controller["scaling_policy"] = create_scaling_policy(scaling)
        self._supervisor = supervisor
        super().__init__(**controller)
        # The controller makes these itself; they become C4's in place, because it holds them in several lists.
        manager: Any = self._checkpoint_manager
        manager.__class__, manager.c4_supervisor = C4CheckpointManager, supervisor
        for one in self._worker_group_callbacks_to_propagate:
            if type(one) is PreemptionCallback:
                watcher: Any = one
                watcher.__class__, watcher._wanted = LatePreemption, None

    def _build_result(self) -> Any:
        manager: Any = self._checkpoint_manager
        manager.keep_what_exists()
        return super()._build_result()

    def c4_outcome(self) -> C4Outcome:
        return self._supervisor.outcome()


class C4TrainerBase(TorchTrainer):
    """``TorchTrainer`` that runs a ``C4Controller``. ``c4_controller_arguments`` is set by ``C4Trainer.fit``."""

    c4_controller_arguments: Mapping[str, Any]
    c4_outcome: C4Outcome | None = None

    def _initialize_and_run_controller(self, **controller: Any) -> Any:
        environment = {**get_env_vars_to_propagate(), "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}
        remote_class: Any = ray.remote(C4Controller)
        actor = remote_class.options(
            num_cpus=0,
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
            runtime_env={"env_vars": environment},
        ).remote(**controller, **self.c4_controller_arguments)
        previous = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread():
            self._register_sigint_handler(actor)
        try:
            ray.get(actor.run.remote())
            result = ray.get(actor.get_result.remote())
            self.c4_outcome = ray.get(actor.c4_outcome.remote())
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, previous)
            ray.kill(actor)
        return result


def split_errors(errors: Mapping[int, BaseException]) -> tuple[dict[int, BaseException], dict[int, str]]:
    """Errors of a poll by rank: those that a loop raised, and those of processes that are gone or do not answer."""
    raised: dict[int, BaseException] = {}
    died: dict[int, str] = {}
    for rank, error in errors.items():
        if isinstance(error, WorkerHealthCheckTimeoutError):
            died[rank] = "the process does not answer"
        elif isinstance(error, WorkerHealthCheckFailedError):
            if isinstance(error.health_check_failure, ray.exceptions.RayActorError):
                died[rank] = "the process is gone"
            else:
                raised[rank] = error  # its answer could not be read: the loop's own doing
        else:
            raised[rank] = error
    return raised, died


def _cause_first(error: WorkerGroupError, failure: Failure) -> None:
    """The user reads the loop's own exception first; peers that failed with it come after."""
    ordered = {rank: error.worker_failures[rank] for rank in failure.ranks}
    echoes = {rank: one for rank, one in error.worker_failures.items() if rank not in ordered}
    error.worker_failures = {**ordered, **echoes}
    if echoes:
        ranks = ", ".join(map(str, sorted(echoes)))
        error.args = (
            f"The training loop raised: {failure.text}\n(the errors of rank {ranks} follow from it)\n{error}",
        )


def set_driver_environment() -> None:
    """What Ray Train reads when a trainer is made: polls at 0.1 s, start time-out; the user's own values stay."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
