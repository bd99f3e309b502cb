"""A training loop's view of where it runs: one process without Ray, a worker of Ray Train (under C4), or a trial of Ray Tune.

The loop is the same in each; it asks its worker for its rank, wraps its model, reports, and begins from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from apps.training.checkpoint import keep_newest, numbered, scratch_folder

WriteCheckpoint = Callable[[Path], None]
"""Writes this rank's files of a checkpoint into an empty folder."""


class Worker(Protocol):
    """What a loop asks of its surroundings."""

    rank: int
    world_size: int
    device: torch.device

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model on the worker's device, its gradients averaged over all workers."""
        ...

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the workers, on each of them."""
        ...

    def newest(self) -> contextlib.AbstractContextManager[Path | None]:
        """Folder of the checkpoint to go on from."""
        ...

    def report(self, metrics: dict[str, Any], write: WriteCheckpoint | None = None) -> None:
        """Tells the figures, with a checkpoint where ``write`` is given. All ranks call it at the same steps."""
        ...


class LocalWorker:
    """The one worker of this process, without Ray. Checkpoints are folders ``checkpoint-STEP`` of ``folder``, two are kept.

    ``history`` holds everything that was reported; ``told`` is called with each entry.
    """

    rank, world_size = 0, 1
    PREFIX = "checkpoint-"

    def __init__(
        self,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
        told: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.folder, self.device, self._told = folder, torch.device(device), told
        self.history: list[dict[str, Any]] = []

    def prepare(self, model: nn.Module) -> nn.Module:
        return model.to(self.device)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return values

    @contextlib.contextmanager
    def newest(self) -> Iterator[Path | None]:
        found = numbered(self.folder, self.PREFIX) if self.folder is not None and self.folder.is_dir() else []
        yield found[-1] if found else None

    def report(self, metrics: dict[str, Any], write: WriteCheckpoint | None = None) -> None:
        self.history.append(metrics)
        if write is not None and self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            final = self.folder / f"{self.PREFIX}{metrics['step']:08d}"
            unfinished = self.folder / f".{final.name}"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            write(unfinished)
            shutil.rmtree(final, ignore_errors=True)
            unfinished.replace(final)
            keep_newest(self.folder, self.PREFIX, 2)
        if self._told is not None:
            self._told(metrics)


class RayTrainWorker:
    """A worker of Ray Train; made inside of a training loop. Under C4 its checkpoints are kept in two memories, too."""

    def __init__(self) -> None:
        import ray.train
        from ray.train.torch import get_device

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = get_device()

    def prepare(self, model: nn.Module) -> nn.Module:
        from ray.train.torch import prepare_model

        return prepare_model(model)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        if self.world_size == 1:
            return values
        summed = values.clone()
        torch.distributed.all_reduce(summed)
        return summed / self.world_size

    @contextlib.contextmanager
    def newest(self) -> Iterator[Path | None]:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def report(self, metrics: dict[str, Any], write: WriteCheckpoint | None = None) -> None:
        import ray.train

        if write is None:
            ray.train.report(metrics)
            return
        with scratch_folder() as folder:
            write(folder)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(str(folder)))


class RayTuneWorker(LocalWorker):
    """A trial of Ray Tune: one process, whose checkpoints Tune keeps, so that an interrupted sweep goes on in mid-trial."""

    def __init__(self, device: torch.device | str = "cpu"):
        super().__init__(None, device)

    @contextlib.contextmanager
    def newest(self) -> Iterator[Path | None]:
        from ray import tune

        checkpoint = tune.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def report(self, metrics: dict[str, Any], write: WriteCheckpoint | None = None) -> None:
        from ray import tune

        self.history.append(metrics)
        if write is None:
            tune.report(metrics)
            return
        with scratch_folder() as folder:
            write(folder)
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(str(folder)))


def bare(model: nn.Module) -> nn.Module:
    """The model inside of a ``DistributedDataParallel``."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


__all__ = ["LocalWorker", "RayTrainWorker", "RayTuneWorker", "Worker", "WriteCheckpoint", "bare"]
