"""The worker's side of the door to Ray Train's internals: reported checkpoints go through C4's tiers, the loop unchanged.

Belongs to ``ray_train.py`` (which checks at start that Ray still has what is used here).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from pyarrow.fs import LocalFileSystem
from ray.train import Checkpoint
from ray.train.torch.config import TorchConfig, _TorchBackend
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import TrainContext, get_train_context
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2.api.report_config import CheckpointUploadMode

from actors.c4.recovery.parts import read_directory
from actors.c4.recovery.randomness import random_states, set_random_states
from actors.c4.recovery.shares import SHARES, ShareReader
from actors.c4.recovery.tiers import CheckpointTiers, WorkerPlan, set_tiers, tiers

logger = logging.getLogger(__name__)

_MARK = "\x1fc4="
"""Separates a checkpoint directory's name from what rank 0 tells the others with it (not a character of a path)."""


class C4TrainContext(TrainContext):
    """Ray Train's context of a worker whose reports go to memory first. Made from the original by setting its class."""

    c4_tiers: CheckpointTiers
    c4_shares: ShareReader
    _c4_ours: bool
    """The report in progress goes through the tiers."""
    _c4_in_memory: bool
    """This rank's part of it is in the node's memory."""
    _c4_states_put_back: bool

    def report(
        self,
        metrics: dict[str, Any],
        checkpoint: Checkpoint | None = None,
        checkpoint_dir_name: str | None = None,
        checkpoint_upload_mode: CheckpointUploadMode = CheckpointUploadMode.SYNC,
        delete_local_checkpoint_after_upload: bool | None = None,
        checkpoint_upload_fn: Any = None,
        validation: Any = False,
    ) -> None:
        # An upload of the user's own, or a checkpoint that is elsewhere already, is Ray Train's business.
        self._c4_ours = (
            checkpoint_upload_fn is None
            and checkpoint_upload_mode != CheckpointUploadMode.NO_UPLOAD
            and (checkpoint is None or isinstance(checkpoint.filesystem, LocalFileSystem))
        )
        if self._c4_ours:
            files = read_directory(Path(checkpoint.path)) if checkpoint is not None else {}
            extra = {"random": random_states()} if self.c4_tiers.plan.settings.random_states else {}
            self._c4_in_memory = self.c4_tiers.store_report(self.report_call_index + 1, files, extra)
        # All ranks meet in the call below: whoever leaves it knows that every rank's part is stored.
        super().report(
            metrics,
            checkpoint,
            checkpoint_dir_name,
            checkpoint_upload_mode,
            delete_local_checkpoint_after_upload,
            checkpoint_upload_fn,
            validation,
        )

    def get_checkpoint(self) -> Checkpoint | None:
        checkpoint = super().get_checkpoint()
        if not self._c4_states_put_back and checkpoint is not None:
            self._c4_states_put_back = True
            if (states := self.c4_tiers.restored_random_states()) is not None:
                set_random_states(states)
        return checkpoint

    def _sync_checkpoint_dir_name_across_ranks(self, checkpoint_dir_name: str | None = None) -> str:
        """Rank 0 decides for all, at one step, whether this checkpoint goes to disk and what the batch shares are."""
        name = checkpoint_dir_name or self.storage_context.make_default_checkpoint_dir_name()
        if self.get_world_rank() == 0:
            told = {
                "disk": self._c4_ours and (self.c4_tiers.disk_is_due() or not self._c4_in_memory),
                "shares": self.c4_shares.newest(),
            }
            name = f"{name}{_MARK}{json.dumps(told)}"
        name, _, told_text = super()._sync_checkpoint_dir_name_across_ranks(name).partition(_MARK)
        heard = json.loads(told_text) if told_text else {}
        SHARES.set(heard.get("shares"))
        if self._c4_ours:
            self.c4_tiers.target(
                self.storage_context.storage_filesystem, self.storage_context.build_checkpoint_path_from_name(name)
            )
            if heard.get("disk"):
                self.c4_tiers.flush()
        return name


class C4StorageContext(StorageContext):
    """Says where a reported checkpoint will be; the tiers bring it there."""

    def persist_current_checkpoint(self, checkpoint: Checkpoint, checkpoint_dir_name: str) -> Checkpoint:
        context = get_train_context()
        if not getattr(context, "_c4_ours", False):
            return super().persist_current_checkpoint(checkpoint, checkpoint_dir_name)
        return Checkpoint(
            filesystem=self.storage_filesystem, path=self.build_checkpoint_path_from_name(checkpoint_dir_name)
        )


class C4WorkerCallback(WorkerCallback):
    """Carries the generation's plans to the workers; set anew by the controller before each start."""

    def __init__(self) -> None:
        self.plans: Mapping[int, WorkerPlan] = {}
        self.keepers: Mapping[int, Any] = {}
        """Per rank: the keeper of its peer node."""
        self.environment: Mapping[str, str] = {}
        self.master_run = ""

    def after_init_train_context(self) -> None:
        plan = self.plans[get_train_context().get_world_rank()]
        os.environ.update(self.environment)
        set_tiers(None)
        if not plan.settings.memory:
            return
        keeper = self.keepers.get(plan.rank)
        if keeper is None:
            made = CheckpointTiers(plan)
        else:
            made = CheckpointTiers(plan, lambda *part: keeper.put.remote(*part), _arrived)
        set_tiers(made)
        # The loop and Ray Train hold this very object: it becomes C4's in place.
        context: Any = get_train_context()
        context.__class__ = C4TrainContext
        context.c4_tiers = made
        context.c4_shares = ShareReader(self.master_run if plan.rank == 0 else "", plan.world_size, plan.generation)
        context._c4_ours = context._c4_in_memory = False
        context._c4_states_put_back = False
        context.storage_context.__class__ = C4StorageContext
        if plan.report_folder:
            context.checkpoint = Checkpoint.from_directory(plan.report_folder)


def finish_checkpoints() -> None:
    """At the end of the loop: the last reported checkpoint reaches the disk."""
    made = tiers()
    if made is not None and not made.finish():
        logger.error("The last reported checkpoint could not be written to the run's storage: the disk tier failed.")


def _arrived(handle: Any, timeout_s: float) -> bool:
    try:
        return bool(ray.get(handle, timeout=timeout_s))
    except ray.exceptions.RayError:
        return False


class C4TorchConfig(TorchConfig):
    """``TorchConfig`` whose process group is recorded: the backend is registered and recording begins before the group exists."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _C4Backend


class _C4Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if "c4" in (backend_config.backend or ""):
            worker_group.execute(_start_recording)
        super().on_start(worker_group, backend_config)


def _start_recording() -> None:
    from actors.c4.injection.hook import install_in_worker
    from actors.c4.recorder.backend import register_backend, start_recording
    from actors.c4.recorder.recorder import RecordingConfig

    register_backend()
    context = get_train_context()
    start_recording(
        RecordingConfig(
            run=os.environ["SEXTANT_C4_RUN"],
            generation=int(os.environ["SEXTANT_C4_GENERATION"]),
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            directory=os.environ.get("SEXTANT_C4_DIR") or None,
        )
    )
    install_in_worker()
