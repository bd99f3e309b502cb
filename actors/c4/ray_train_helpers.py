"""Ray Train's own helpers, as C4 needs them: its list of checkpoints, its meeting actor, its preemption watcher.

Belongs to ``ray_train.py``, the door to Ray Train's internals.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.checkpoint.sync_actor import SynchronizationActor

from actors.c4.recovery import disk
from actors.c4.recovery.supervisor import Supervisor

logger = logging.getLogger(__name__)

LATER_S = 2.0
"""What training does not wait for (the preemption watcher, warm processes) starts so long after it has begun."""


class SpareSynchronization:
    """Ray Train makes the actor at which ranks meet anew for each group, a second or two of imports: have one in stock."""

    def __init__(self) -> None:
        self._spare: Any = None
        self._options: dict[str, Any] = {}
        self._arguments: dict[str, Any] = {}

    def options(self, **options: Any) -> SpareSynchronization:
        self._options = options
        return self

    def remote(self, **arguments: Any) -> Any:
        self._arguments = arguments
        spare, self._spare = self._spare, None
        return spare if spare is not None else self._make()

    def fill(self) -> None:
        if self._spare is None and self._arguments:
            self._spare = self._make()
            self._spare.get_counter.remote()

    def _make(self) -> Any:
        actor_class: Any = SynchronizationActor
        return actor_class.options(**self._options).remote(**self._arguments)


class LatePreemption(PreemptionCallback):
    """Ray Train's preemption watcher, started when training runs again instead of while it starts."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._stop_watcher()
        self._wanted, self._start_at = worker_group, time.monotonic() + LATER_S

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        if self._wanted is not None and time.monotonic() >= self._start_at:
            wanted, self._wanted = self._wanted, None
            super().after_worker_group_start(wanted)

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self._wanted = None
        super().before_worker_group_shutdown(worker_group)


class C4CheckpointManager(CheckpointManager):
    """Knows that a reported checkpoint may be in memory only: what is not on disk is kept as the newest, never in the history."""

    c4_supervisor: Supervisor

    def _save_state_and_delete_old_checkpoints(self) -> None:
        newest = self._latest_checkpoint_result
        for result in [one for one in self._checkpoint_results if one is not newest]:
            if not self._on_disk(result):
                self._drop(result)
        super()._save_state_and_delete_old_checkpoints()

    def _write_state_to_storage(self) -> None:
        results, newest = self._checkpoint_results, self._latest_checkpoint_result
        try:
            # A later run must find only what exists.
            self._checkpoint_results = [one for one in results if one is not newest or self._on_disk(one)]
            self._latest_checkpoint_result = self._checkpoint_results[-1] if self._checkpoint_results else None
            super()._write_state_to_storage()
        except OSError as error:
            logger.warning(
                "The list of checkpoints could not be written to the run's storage: %s. Training goes on.", error
            )
        finally:
            self._checkpoint_results, self._latest_checkpoint_result = results, newest

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        if not self.c4_supervisor.restored_from_memory:
            self._fall_back_to_disk()
        return super().before_init_train_context(workers)

    def keep_what_exists(self) -> None:
        """At the end: the history holds only checkpoints that are whole on disk."""
        self._fall_back_to_disk()
        for result in list(self._checkpoint_results):
            if not self._on_disk(result):
                self._drop(result)

    def _fall_back_to_disk(self) -> None:
        """The newest checkpoint that is whole on disk becomes the latest; damaged ones are never chosen."""
        by_time: list[Any] = sorted(
            self._checkpoint_results, key=lambda one: self._checkpoint_to_report_index[one.checkpoint]
        )
        for result in reversed(by_time):
            if disk.is_whole(result.checkpoint.filesystem, result.checkpoint.path):
                self._latest_checkpoint_result = result
                return
            logger.warning("The checkpoint %s is not whole on disk and is left out.", result.checkpoint.path)
            self._drop(result)
        self._latest_checkpoint_result = None

    def _on_disk(self, result: Any) -> bool:
        return disk.exists(result.checkpoint.filesystem, result.checkpoint.path)

    def _drop(self, result: Any) -> None:
        self._checkpoint_results = [one for one in self._checkpoint_results if one is not result]
        self._checkpoint_to_report_index.pop(result.checkpoint, None)
        self._pending_training_results.pop(result.checkpoint, None)
