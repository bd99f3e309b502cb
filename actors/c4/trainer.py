"""``C4Trainer``: a Ray Train trainer that carries monitors, isolates what they find faulty, and trains again in seconds.

The same shape as ``ray.train.torch.TorchTrainer``, and the user's loop unchanged:

    trainer = C4Trainer(loop, scaling_config=ScalingConfig(num_workers=4), run_config=RunConfig(...))
    result = trainer.fit()        # ray.train.Result; result.c4: verdicts, restarts, times

Set up in the driver: the C4 master, then Ray Train's own controller with C4's hooks (``ray_train.py``).
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.c4.diagnosis.verdict import Verdict
from actors.c4.injection.faults import ENVIRONMENT as INJECTION_VARIABLE
from actors.c4.monitors.master import start_master, stop_master
from actors.c4.ray_prestart import HOOK_VARIABLE
from actors.c4.ray_train import C4TrainerBase, set_driver_environment, verify
from actors.c4.ray_train_worker import C4TorchConfig, C4WorkerCallback, finish_checkpoints
from actors.c4.recovery.policy import Decision, Prices, Situation, decide
from actors.c4.recovery.settings import C4Settings
from actors.c4.recovery.supervisor import Supervisor
from actors.c4.recovery.warm import PRELOAD_VARIABLE, preload_value

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobPolicy:
    """The policy with what only the trainer knows filled in; picklable, asked by the master."""

    prices: Prices
    min_workers: int
    max_workers: int
    ends_at: float = math.inf
    """Wall time at which the run is expected to end without faults (``C4Settings.expected_run_s``)."""

    def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
        min_nodes = situation.min_nodes
        if self.min_workers < self.max_workers and situation.nodes:
            per_node = max(1, round((situation.world_size or self.max_workers) / situation.nodes))
            min_nodes = -(-self.min_workers // per_node)
        remaining_s = max(0.0, self.ends_at - time.time())
        return decide(verdict, replace(situation, min_nodes=min_nodes, remaining_s=remaining_s), self.prices)


class C4Trainer(C4TrainerBase):
    """``TorchTrainer`` under C4. All of its arguments, and ``c4``.

    ``torch_config`` None: the recording backend ``c4`` (gloo or NCCL under it). Another ``TorchConfig`` keeps its backend;
    then nothing is recorded, hangs are not named, and dead processes are still restarted elsewhere.

    ``RunConfig.failure_config.max_failures`` counts only what the loop itself raises.
    """

    def __init__(
        self,
        train_loop_per_worker: Callable[..., Any],
        *,
        train_loop_config: dict[str, Any] | None = None,
        torch_config: Any = None,
        scaling_config: Any = None,
        run_config: Any = None,
        datasets: dict[str, Any] | None = None,
        dataset_config: Any = None,
        validation_config: Any = None,
        c4: C4Settings | None = None,
    ):
        verify()
        set_driver_environment()
        self.c4 = c4 or C4Settings()
        self.c4_run = f"{(run_config and run_config.name) or 'train'}-{uuid.uuid4().hex[:8]}"
        injection = self.c4.monitors.injection
        self._control_folder = str(self._ring_folder() / f"control-{self.c4_run}") if injection else ""
        super().__init__(
            train_loop_per_worker,
            train_loop_config=train_loop_config,
            torch_config=torch_config or C4TorchConfig(backend="c4"),
            scaling_config=scaling_config,
            run_config=run_config,
            datasets=datasets,
            dataset_config=dataset_config,
            validation_config=validation_config,
        )

    def fit(self) -> Any:
        """Trains to the end, through faults.

        Returns:
            Ray Train's ``Result`` with ``c4``: a ``C4Outcome``.

        Raises:
            ray.train.TrainingFailedError: the loop raised beyond its budget, or C4 gave up (the text says why).
            C4Error: Ray Train's internals are not those that C4 knows.
        """
        import ray

        if self.running_in_local_mode:
            return super().fit()
        ray.is_initialized() or ray.init()
        with self._monitored() as master:
            self.c4_controller_arguments = self._controller_arguments(Supervisor(self.c4_run, self.c4, master))
            self.c4_master = master
            logger.info("C4 watches the run %s (%s workers).", self.c4_run, self.scaling_config.num_workers)
            result: Any = super().fit()
            result.c4 = self.c4_outcome
            return result

    def _get_train_func(self) -> Callable[[], Any]:
        loop = super()._get_train_func()

        def loop_then_last_checkpoint() -> Any:
            value = loop()
            finish_checkpoints()
            return value

        return loop_then_last_checkpoint

    @contextlib.contextmanager
    def _monitored(self) -> Iterator[Any]:
        made = None if self.c4.folder else tempfile.mkdtemp(prefix="sextant-c4-")
        scaling: Any = self.scaling_config
        handle = start_master(
            self.c4_run,
            self.c4.monitors,
            folder=Path(self.c4.folder or made or "."),
            ring_folder=self._ring_folder(),
            policy=JobPolicy(
                self.c4.prices, scaling.min_workers, scaling.max_workers, time.time() + self.c4.expected_run_s
            ),
            control_folder=self._control_folder,
        )
        try:
            yield handle
        finally:
            stop_master(handle)
            for folder in (made, self._control_folder):
                if folder:
                    shutil.rmtree(folder, ignore_errors=True)

    def _ring_folder(self) -> Path:
        from actors.c4.recorder.layout import default_directory

        return Path(self.c4.ring_folder) if self.c4.ring_folder else Path(default_directory())

    def _controller_arguments(self, supervisor: Supervisor) -> dict[str, Any]:
        to_workers = C4WorkerCallback()
        to_workers.environment = {"SEXTANT_C4_RUN": self.c4_run, "SEXTANT_C4_DIR": str(self._ring_folder())}
        if self._control_folder:
            to_workers.environment = {**to_workers.environment, INJECTION_VARIABLE: self._control_folder}
        to_workers.master_run = self.c4_run
        if self.c4.warm_workers:
            run_config: Any = self.run_config
            runtime_env = dict(run_config.worker_runtime_env or {})
            runtime_env["env_vars"] = {
                **runtime_env.get("env_vars", {}),
                HOOK_VARIABLE: "actors.c4.recovery.warm.preload",
                PRELOAD_VARIABLE: preload_value(self.train_loop_per_worker, self.c4.preload),
                "SEXTANT_C4_RUN": self.c4_run,
            }
            run_config.worker_runtime_env = runtime_env
        return {"supervisor": supervisor, "to_workers": to_workers, "keep_warm": self.c4.warm_workers}


__all__ = ["C4Settings", "C4Trainer", "JobPolicy"]
