"""Recovery measured: a virtual cluster of one-CPU nodes, fits that are hurt while they train, and what each fault cost.

A trial: hurt a rank, wait until a step that was not done before has ended on all ranks. The old processes must be gone by then.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.c4.recovery_loop import train

FAULTS = ("sigkill", "sigstop", "gil_lock")
_POLL_S = 0.02
STEPS_BETWEEN = 5
STILL_S = 3.0


class TrialError(RuntimeError):
    """The fit did not do what the trial waits for."""


@contextlib.contextmanager
def virtual_cluster(nodes: int) -> Iterator[Any]:
    """A head without CPUs and ``nodes`` nodes of one CPU each, on this machine; yields the ``Cluster``."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 * 2**20},
    )
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@dataclass
class Records:
    """What the workers of a fit wrote."""

    folder: Path

    def all(self) -> list[dict[str, Any]]:
        rows = []
        for path in self.folder.glob("rank*.jsonl"):
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last line of a killed process may be cut
                    rows.append(json.loads(line))
        return sorted(rows, key=lambda row: row["at"])

    def ended(self, pids: set[int]) -> dict[int, float]:
        """Steps that all of these processes have ended, with the time of the last of them."""
        ends: dict[int, dict[int, float]] = {}
        for row in self.all():
            if row["event"] == "step" and row["pid"] in pids:
                ends.setdefault(row["step"], {})[row["pid"]] = row["at"]
        return {step: max(by_pid.values()) for step, by_pid in ends.items() if len(by_pid) == len(pids)}

    def losses(self) -> dict[int, set[tuple[int, float]]]:
        """(rank, loss) by step; more losses than ranks where a step was done twice and differently."""
        found: dict[int, set[tuple[int, float]]] = {}
        for row in self.all():
            if row["event"] == "step":
                found.setdefault(row["step"], set()).add((row["rank"], row["loss"]))
        return found


@dataclass(frozen=True)
class Trial:
    """One fault and what came of it; seconds since the fault."""

    fault: str
    rank: int
    recovered_s: float
    """First new step ended on all ranks; the cap when ``capped``."""
    loop_started_s: float
    """The loop began again on rank 0."""
    steps_lost: int
    """Steps that had ended on all ranks and were done again."""
    survivors: int
    """Processes of the old generation alive after recovery."""
    warm_workers: int = 0
    """Workers of the new generation whose process existed before the fault."""
    capped: bool = False


@dataclass
class Fit:
    """A trainer fitted in a thread, to be hurt from outside. ``make(folder, steps, step_s)`` makes the trainer."""

    make: Callable[[Path, int | None, float], Any]
    folder: Path
    world_size: int
    step_s: float = 0.2
    steps: int | None = None
    result: Any = None
    error: BaseException | None = None
    abandoned: bool = False
    _thread: threading.Thread | None = None
    trainer: Any = field(default=None)

    def __enter__(self) -> Fit:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.records = Records(self.folder)
        self.trainer = self.make(self.folder, self.steps, self.step_s)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Ends the loops at a step that none has reached, and waits; an abandoned fit ends with its cluster."""
        if self.abandoned:
            return
        if self.steps is None and not (self.folder / "stop").exists():
            newest = max((row["step"] for row in self.records.all() if row["event"] == "step"), default=0)
            temporary = self.folder / ".stop"
            temporary.write_text(str(newest + 5))  # a report keeps the ranks within one step of each other
            temporary.replace(self.folder / "stop")
        self.join(timeout_s=180)

    def join(self, timeout_s: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise TrialError(f"The fit did not end within {timeout_s:.0f} s.")

    def _run(self) -> None:
        try:
            self.result = self.trainer.fit()
        except BaseException as error:  # seen by who waits
            self.error = error

    def generation(self) -> dict[int, int]:
        """Processes that train now: pid by rank; empty until all have begun."""
        newest: dict[int, int] = {}
        for row in self.records.all():
            if row["event"] == "ready":
                newest[row["rank"]] = row["pid"]
        alive = {rank: pid for rank, pid in newest.items() if psutil.pid_exists(pid)}
        return alive if len(alive) == self.world_size else {}

    def wait_for_steps(self, count: int, timeout_s: float = 180.0) -> dict[int, int]:
        """The processes that train now, once they have ended ``count`` steps together."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.error is not None:
                raise TrialError(f"The fit ended: {self.error}") from self.error
            pids = self.generation()
            if pids and len(self.records.ended(set(pids.values()))) >= count:
                return pids
            time.sleep(_POLL_S * 5)
        raise TrialError(f"No {count} steps within {timeout_s:.0f} s.")

    def hurt(self, fault: str, rank: int, cap_s: float) -> Trial:
        """One trial; ends the hurt process when the cap is reached, so that the fit can go on."""
        old = self.wait_for_steps(STEPS_BETWEEN)
        done_before = time.time()
        if fault == "sigkill":
            os.kill(old[rank], signal.SIGKILL)
        elif fault == "sigstop":
            os.kill(old[rank], signal.SIGSTOP)
        elif fault == "gil_lock":
            (self.folder / f"gil-{rank}").touch()
        else:
            raise ValueError(f"There is no fault {fault!r}; there are {', '.join(FAULTS)}.")
        recovered = self._recovered(set(old.values()), done_before + cap_s)
        if recovered is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(old[rank], signal.SIGKILL)
            return Trial(fault, rank, cap_s, cap_s, 0, 0, 0, capped=True)
        before = self.records.ended(set(old.values()))
        last = max(before)
        rows = [row for row in self.records.all() if row["pid"] not in old.values() and row["at"] > done_before]
        resumed = min(row["step"] for row in rows if row["event"] == "ready")
        started = min(row["at"] for row in rows if row["event"] == "start" and row["rank"] == 0)
        return Trial(
            fault,
            rank,
            recovered - done_before,
            started - done_before,
            max(0, last + 1 - resumed),
            sum(_is_process(pid) for pid in old.values()),
            sum(row["event"] == "start" and row["born"] < done_before for row in rows),
        )

    def _recovered(self, old: set[int], deadline: float) -> float | None:
        """When a step beyond all that the old processes ended was ended by all new ones."""
        while time.time() < deadline:
            if self.error is not None:
                raise TrialError(f"The fit ended: {self.error}") from self.error
            new = {pid for pid in self.generation().values() if pid not in old}
            if len(new) == self.world_size:
                last = max(self.records.ended(old), default=-1)
                later = [at for step, at in self.records.ended(new).items() if step > last]
                if later:
                    return min(later)
            time.sleep(_POLL_S)
        return None


def c4_trainer(world_size: int, storage: Path, **settings: Any) -> Callable[[Path, int | None, float], Any]:
    """Makes ``C4Trainer``s on the benchmark's loop; ``settings``: of ``C4Settings``."""

    def make(folder: Path, steps: int | None, step_s: float) -> Any:
        from ray.train import RunConfig, ScalingConfig

        from actors.c4.recovery.settings import C4Settings
        from actors.c4.trainer import C4Trainer

        os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
        return C4Trainer(
            train,
            train_loop_config={"folder": str(folder), "steps": steps, "step_s": step_s},
            scaling_config=ScalingConfig(num_workers=world_size),
            run_config=RunConfig(name=folder.name, storage_path=str(storage)),
            c4=C4Settings(**settings),
        )

    return make


def default_trainer(world_size: int, storage: Path) -> Callable[[Path, int | None, float], Any]:
    """Makes Ray Train's own ``TorchTrainer`` with its defaults, allowed to restart."""

    def make(folder: Path, steps: int | None, step_s: float) -> Any:
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        os.environ.pop("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", None)
        return TorchTrainer(
            train,
            train_loop_config={"folder": str(folder), "steps": steps, "step_s": step_s},
            scaling_config=ScalingConfig(num_workers=world_size),
            run_config=RunConfig(
                name=folder.name,
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=-1),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )

    return make


def repair(fit: Fit) -> tuple[str, ...]:
    """Takes all nodes out of quarantine, as after a repair, so that one cluster serves all trials; which ones."""
    import ray

    master = fit.trainer.c4_master
    quarantined = ray.get(master.quarantine.remote(), timeout=10)
    for node_id in quarantined:
        ray.get(master.release.remote(node_id), timeout=10)
    return tuple(quarantined)


def wait_until_warm(run: str, processes: int, timeout_s: float) -> bool:
    """Until so many idle worker processes of the run have done their imports (used CPU, and none for ``STILL_S``: they import on
    idle processor time, with pauses); whether it came so far.

    A fault while they are still importing is a fault soon after the last one: it recovers as slowly as without warm processes.
    """
    deadline = time.monotonic() + timeout_s
    changed: dict[int, tuple[float, float]] = {}
    while time.monotonic() < deadline:
        now, idle = time.monotonic(), _idle_cpu_seconds(run)
        for pid, seconds in idle.items():
            if pid not in changed or changed[pid][0] != seconds:
                changed[pid] = (seconds, now)
        if sum(changed[pid][0] > 1.0 and now - changed[pid][1] >= STILL_S for pid in idle) >= processes:
            return True
        time.sleep(0.5)
    return False


def _idle_cpu_seconds(run: str) -> Mapping[int, float]:
    found = {}
    for process in psutil.process_iter(["name", "cmdline"]):
        try:
            idle = "ray::IDLE" in " ".join(process.info["cmdline"] or [])
            if idle and process.environ().get("SEXTANT_C4_RUN") == run:
                found[process.pid] = round(sum(process.cpu_times()[:2]), 1)
        except psutil.Error:
            continue
    return found


def _is_process(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
