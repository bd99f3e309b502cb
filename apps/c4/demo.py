"""``python -m apps.c4 demo``: a real training on a virtual cluster, into which a fault of each class is injected in turn.

Each fault is named, its node is isolated, and training goes on where it stood. Everything through ``C4Trainer``, as a user's own
program would; only the cluster's nodes are processes of this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.c4.diagnosis.verdict import FaultClass
from actors.c4.injection.faults import KINDS, Fault, FaultName, InjectionError
from actors.c4.ports import CLEARED, NumberedVerdict
from apps.c4.config import C4Config, DemoConfig
from apps.c4.report import Chapter, print_summary, write_report
from apps.c4.story import Moment, MomentKind, StepPoint, Story
from apps.program.errors import UserError
from apps.program.run_folder import RunFolder, new_run_folder

STEP_FILE = "steps.jsonl"


def demo(config: C4Config) -> None:
    """Train on a virtual cluster, break something of each class, and watch it being named, isolated and trained past."""
    settings = config.demo
    console = Console()
    folder = new_run_folder("c4", config=config)
    nodes = settings.workers + settings.spare_nodes
    console.print(f"Starting a virtual cluster of {nodes} nodes ...")
    with virtual_cluster(nodes):
        job = _Job(settings, folder)
        try:
            job.start()
            _break_in_turn(job, settings, console)
        finally:
            job.end()
    story = job.story()
    print_summary(story, job.chapters)
    named = sum(1 for one in job.trials if one.right)
    summary = (
        f"{settings.workers} workers train a network on handwritten digits; {len(job.trials)} faults were injected, "
        f"{named} named rightly."
    )
    accuracy = job.last_metrics.get("accuracy")
    extra = {"accuracy": accuracy, "trials": [vars(one) for one in job.trials]}
    path = write_report(folder, story, job.chapters, title="C4: faults of four classes", summary=summary, extra=extra)
    console.print(
        f"{summary} Accuracy on digits of other writers: {accuracy:.3f}." if accuracy is not None else summary
    )
    console.print(f"The report: {path}")
    if named < len(job.trials):
        raise UserError(
            f"Only {named} of {len(job.trials)} faults were named rightly: {folder}/result.json holds the verdicts."
        )


def planned_faults(settings: DemoConfig) -> tuple[Fault, ...]:
    """One of each class, at ranks apart from one another."""
    last = settings.workers - 1
    return (
        Fault(FaultName.SLOW_COMPUTE, rank=1, factor=settings.slow_compute_factor),
        Fault(FaultName.SIGSTOP, rank=last),
        Fault(FaultName.SLOW_LINK, rank=0, peer=1, rate_bytes_per_s=settings.slow_link_bytes_per_s),
        Fault(FaultName.STALLED_LINK, rank=1, peer=2),
    )


@contextlib.contextmanager
def virtual_cluster(nodes: int) -> Iterator[str]:
    """A head without room for workers and ``nodes`` nodes of one CPU each, all on this machine; yields the address.

    Raises:
        UserError: this process is connected to another Ray already.
    """
    from actors.cluster.session import environment

    for name, value in environment().items():
        os.environ.setdefault(name, value)
    import ray
    from ray.cluster_utils import Cluster

    if ray.is_initialized():
        raise UserError("The demo makes a virtual cluster of its own; this process is connected to another one.")
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": 150_000_000, "include_dashboard": False},
    )
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1, object_store_memory=100_000_000, wait=False)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


@dataclass
class Trial:
    """One injected fault and what was made of it."""

    fault: str
    expected_class: str
    named: str = ""
    culprit: str = ""
    detection_s: float | None = None
    right: bool = False


@dataclass
class _Job:
    """The training in a thread, and what has been seen of it."""

    settings: DemoConfig
    folder: RunFolder
    chapters: list[Chapter] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    last_metrics: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    error: BaseException | None = None
    trainer: Any = None
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to train; ``wait_for_step`` tells when it does."""
        from ray.train import RunConfig, ScalingConfig

        from actors.c4.monitors.settings import MonitorSettings
        from actors.c4.recovery.settings import C4Settings
        from actors.c4.trainer import C4Trainer
        from apps.c4.step_log import StepLog
        from apps.c4.workload import train_digits

        faults = len(planned_faults(self.settings))
        loop_config = {
            # More than can be done in the time: the demo ends the training, not the other way round.
            "steps": 100_000 if faults else self.settings.last_steps,
            "batch": self.settings.batch,
            "width": self.settings.width,
            "learning_rate": self.settings.learning_rate,
            "seed": self.settings.seed,
            "stop_file": str(self._stop_file),
        }
        log = StepLog(str(self.folder / STEP_FILE))
        storage = str(Path(self.folder).absolute() / "ray")
        self.trainer = C4Trainer(
            train_digits,
            train_loop_config=loop_config,
            scaling_config=ScalingConfig(num_workers=self.settings.workers),
            run_config=RunConfig(
                name="demo",
                storage_path=storage,
                callbacks=[log],
                worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
            ),
            c4=C4Settings(monitors=MonitorSettings(injection=True)),
        )
        self.note(MomentKind.STARTED, f"{self.settings.workers} workers")
        self._thread = threading.Thread(target=self._fit, name="demo-training", daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            self.result = self.trainer.fit()
        except BaseException as error:  # told by whoever waits next
            self.error = error

    @property
    def _stop_file(self) -> Path:
        return Path(self.folder).absolute() / "stop"

    @property
    def master(self) -> Any:
        master = getattr(self.trainer, "c4_master", None)
        if master is None:
            raise UserError("The training has no C4 master yet.")
        return master

    def note(self, kind: MomentKind, text: str) -> None:
        self.moments.append(Moment(time.time(), kind, text))

    def steps(self) -> list[StepPoint]:
        """All reported so far."""
        path = self.folder / STEP_FILE
        if not path.exists():
            return []
        points = []
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            points.append(StepPoint(entry["at_s"], entry["step"], entry["loss"], entry["generation"]))
            self.last_metrics = entry
        return points

    def wait_for(self, what: str, ready: Any, patience_s: float | None = None) -> Any:
        """Until ``ready()`` is true; UserError when the training ended or patience did."""
        deadline = time.monotonic() + (patience_s or self.settings.patience_s)
        while not (value := ready()):
            if self.error is not None:
                raise UserError(
                    f"The training ended while the demo waited for {what}: {str(self.error).splitlines()[0]}"
                ) from self.error
            if time.monotonic() > deadline:
                raise UserError(
                    f"The demo waited in vain for {what}; the run folder {self.folder} holds what happened."
                )
            time.sleep(0.1)
        return value

    def end(self) -> None:
        """Let the training finish at its next step, and wait for it."""
        self._stop_file.touch()
        if self._thread is not None:
            self._thread.join(timeout=self.settings.patience_s)
        self.note(MomentKind.FINISHED, "")
        self.steps()

    def story(self) -> Story:
        """Moments of the run, with the restarts that the trainer tells of."""
        moments = list(self.moments)
        for restart in self.result.c4.restarts if self.result is not None else ():
            moments += [
                Moment(restart.seen_at_s + after_s, MomentKind.RESTARTED, f"generation {restart.generation}")
                for phase, after_s in restart.phases_s
                if phase == "training"
            ]
        return Story(tuple(self.steps()), tuple(sorted(moments, key=lambda moment: moment.at_s)))


def _break_in_turn(job: _Job, settings: DemoConfig, console: Console) -> None:
    import ray

    job.wait_for("the first step", job.steps, 180.0)
    for fault in planned_faults(settings):
        before = job.steps()[-1]
        job.wait_for("healthy steps", lambda: job.steps()[-1].step >= before.step + settings.healthy_steps)  # noqa: B023
        step = job.steps()[-1]
        console.print(
            f"step {step.step:5d}  loss {step.loss:.3f}   [bold]injecting[/bold] {fault.name.value} at rank {fault.rank}"
        )
        seen = max((one.number for one in ray.get(job.master.verdicts.remote(0))), default=0)
        trial = Trial(fault.name.value, str(KINDS[fault.name].expected_class))
        job.trials.append(trial)
        injected_at = time.time()
        try:
            ray.get(job.master.inject.remote(fault), timeout=30)
        except (InjectionError, ray.exceptions.RayError) as error:
            raise UserError(f"{fault.name.value} could not be injected: {str(error).splitlines()[-1]}") from error
        job.note(MomentKind.FAULT, f"{fault.name.value} at rank {fault.rank}")
        verdict = job.wait_for("a verdict", lambda: _first_verdict(job.master, seen))  # noqa: B023
        status = ray.get(job.master.status.remote())
        _judge(trial, verdict, fault, injected_at)
        job.chapters.append(Chapter(verdict, status))
        told = verdict.verdict
        job.moments.append(Moment(verdict.named_at, MomentKind.VERDICT, f"{told.kind.value}: {told.culprit}"))
        console.print(
            f"    named after {trial.detection_s:.1f} s: [bold]{told.fault_class.value}[/bold], {told.kind.value}, "
            f"{told.culprit} ({'right' if trial.right else 'WRONG'}); {told.evidence[0] if told.evidence else ''}"
        )
        generation = ray.get(job.master.generation.remote()).number if verdict.action != "evict" else verdict.generation
        evicted = job.wait_for("the eviction", lambda: _evicted(job.master, seen))  # noqa: B023
        job.moments.append(Moment(evicted.named_at, MomentKind.ISOLATED, ", ".join(node[:8] for node in evicted.nodes)))
        console.print(f"    isolated: node {', '.join(node[:8] for node in evicted.nodes)}; {evicted.reason}")
        newest = job.steps()[-1].step
        again = job.wait_for(
            "training to go on",
            lambda: next((p for p in job.steps() if p.generation > generation and p.step > newest), None),  # noqa: B023
        )
        job.note(MomentKind.FIRST_STEP, f"step {again.step}")
        console.print(f"    training again {again.at_s - injected_at:.1f} s after the fault, at step {again.step}")
    newest = job.steps()[-1].step
    job.wait_for("the last steps", lambda: job.steps()[-1].step >= newest + settings.last_steps)


def _first_verdict(master: Any, after: int) -> NumberedVerdict | None:
    import ray

    verdicts = ray.get(master.verdicts.remote(after, 1.0))
    return next((one for one in verdicts if one.action != CLEARED), None)


def _evicted(master: Any, after: int) -> NumberedVerdict | None:
    import ray

    return next((one for one in ray.get(master.verdicts.remote(after)) if one.action == "evict"), None)


def _judge(trial: Trial, one: NumberedVerdict, fault: Fault, injected_at: float) -> None:
    verdict = one.verdict
    trial.named, trial.culprit = verdict.kind.value, str(verdict.culprit)
    trial.detection_s = one.named_at - injected_at
    if verdict.fault_class in (FaultClass.COMMUNICATION_SLOW, FaultClass.COMMUNICATION_HANG) and fault.peer is not None:
        culprit_right = verdict.culprit.link == (fault.rank, fault.peer)
    else:
        culprit_right = verdict.culprit.ranks == (fault.rank,)
    trial.right = culprit_right and verdict.kind in KINDS[fault.name].expected
