"""Runs a pre-training: in this process, or as workers of Ray Train under C4, fed by Ray Data."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apps.mcmisp.config import McmispConfig
from apps.mcmisp.data.feed import local_feed, ray_dataset, streaming_feed, unsplit_data_config
from apps.mcmisp.data.order import RowOrder
from apps.mcmisp.data.shards import PackedRows
from apps.mcmisp.tables import table_of
from apps.mcmisp.training.loop import MODEL_FILE, Pretrained, Pretraining
from apps.program.errors import UserError
from apps.training.progress import ReportLog, followed
from apps.training.worker import LocalWorker, RayTrainWorker, Worker

logger = logging.getLogger(__name__)

Told = Callable[[dict[str, Any]], None]


def row_order(config: McmispConfig, rows: PackedRows) -> RowOrder:
    """
    Raises:
        UserError: the corpus has fewer rows than a batch, or a batch cannot be divided among the workers.
    """
    workers = max(1, config.training.workers)
    if config.training.batch % workers:
        raise UserError(f"training.batch {config.training.batch} cannot be divided among {workers} workers.")
    try:
        return RowOrder(len(rows), config.training.batch, config.data.window_rows, config.training.seed)
    except ValueError as error:
        raise UserError(
            f"The corpus has {len(rows)} rows, fewer than training.batch {config.training.batch}."
        ) from error


def fit_here(
    config: McmispConfig, rows: PackedRows, folder: Path | None, told: Told | None = None, worker: Worker | None = None
) -> Pretrained:
    """Trains in this process; goes on from the newest checkpoint in ``folder`` when there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    worker = worker or LocalWorker(folder, device, told)
    table = table_of(rows, config.cooccurrence) if config.is_guided else None
    return Pretraining(config, rows, local_feed(rows, row_order(config, rows)), worker, table).run()


def fit_on_ray(config: McmispConfig, rows: PackedRows, folder: Path, told: Told | None = None) -> Path:
    """Trains with ``training.workers`` workers of Ray Train under C4; Ray must run. Returns the path of ``model.pt``.

    A worker that dies is replaced, and the training goes on from the newest checkpoint with exactly its rows.

    Raises:
        UserError: the training failed beyond what C4 repairs; the text is the loop's.
    """
    import ray.train

    from actors.c4.recovery.settings import C4Settings
    from actors.c4.trainer import C4Trainer

    row_order(config, rows)
    table_of(rows, config.cooccurrence, workers=config.training.workers) if config.is_guided else None
    folder = folder.absolute()
    with tempfile.TemporaryDirectory(prefix="mcmisp-") as scratch:
        log = Path(scratch) / "reports.jsonl"
        trainer = C4Trainer(
            _loop,
            train_loop_config={"config": config.model_dump_json(), "rows": str(rows.folder)},
            scaling_config=ray.train.ScalingConfig(num_workers=config.training.workers, use_gpu=_has_gpus()),
            run_config=ray.train.RunConfig(
                name="pretrain", storage_path=str(folder), callbacks=[ReportLog(str(log))],
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            ),
            datasets={"train": ray_dataset(rows)},
            dataset_config=unsplit_data_config(),
            c4=C4Settings(),
        )  # fmt: skip
        try:
            with followed(log, told or (lambda entry: None)):
                result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise UserError(f"The training failed: {_reason(error)}") from error
    if result.checkpoint is None:
        raise UserError("The training ended without a checkpoint.")
    with result.checkpoint.as_directory() as found:
        target = folder / MODEL_FILE
        target.write_bytes((Path(found) / MODEL_FILE).read_bytes())
    return target


def _loop(settings: dict[str, Any]) -> None:
    import ray.train

    config = McmispConfig.model_validate_json(settings["config"])
    rows = PackedRows(Path(settings["rows"]))
    worker = RayTrainWorker()
    shard = ray.train.get_dataset_shard("train")
    feed = streaming_feed(shard, row_order(config, rows), rows.manifest.row_tokens, worker.rank, worker.world_size)
    table = table_of(rows, config.cooccurrence) if config.is_guided else None
    Pretraining(config, rows, feed, worker, table).run()


def _has_gpus() -> bool:
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0


def _reason(error: BaseException) -> str:
    """The innermost sentence: what the loop itself raised."""
    failures = getattr(error, "worker_failures", None) or {}
    inner: BaseException = next(iter(failures.values()), error)
    while inner.__cause__ is not None:
        inner = inner.__cause__
    return " ".join(str(inner).split())[:500]


__all__ = ["fit_here", "fit_on_ray", "row_order"]
