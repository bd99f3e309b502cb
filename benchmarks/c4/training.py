"""A small real training job of DDP workers on the c4 backend, each a plain process: what live trials are injected into.

Workers are forked from a server that has torch imported, so that a set of four trains within a second or two.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import shutil
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from actors.c4 import processes
from actors.c4.generation import Generation, Worker

MODULES = [
    "torch",
    "torch._dynamo",
    "torch.optim",
    "torch.nn.parallel",
    "actors.c4.recorder.backend",
    "benchmarks.c4.training",
]


@dataclass(frozen=True)
class Job:
    """What the workers train, and which healthy pauses they make."""

    world_size: int = 4
    width: int = 512
    batch: int = 64
    bucket_mib: float = 2.0
    device_s: float = 0.05
    """A worker waits so long for its input in every step. Four workers on a machine of two cores would otherwise mostly wait
    for one another's processor, which workers with an accelerator each do not."""
    evaluate_every: int = 0
    """Steps; 0: never. All ranks evaluate, for ``pause`` times the median step."""
    checkpoint_every: int = 0
    """Rank 0 writes the model to disk; the whole takes ``pause`` times the median step, and the others wait."""
    collect_every: int = 0
    """Each rank, at a step of its own, collects garbage for ``pause`` times the median step with the interpreter locked."""
    pause: tuple[float, float] = (1.0, 5.0)
    """Lengths of pauses in median steps, drawn between these."""
    seed: int = 0


@dataclass
class WorkerSet:
    """Running workers; leave the with-statement and they are dead."""

    run: str
    number: int
    folder: Path
    rings: Path
    job: Job
    nodes: int
    processes: list[BaseProcess] = field(default_factory=list)

    @property
    def control(self) -> Path:
        """Folder of the fault injection's control files."""
        return self.folder / "control"

    def generation(self) -> Generation:
        """Ranks in blocks over ``nodes`` virtual nodes."""
        size = self.job.world_size
        workers = []
        for rank, process in enumerate(self.processes):
            node = rank * self.nodes // size
            workers.append(Worker(rank, f"node-{node}", f"node-{node}", process.pid or 0))
        return Generation(self.number, tuple(workers))

    def steps(self) -> list[int]:
        """Steps done by each rank."""
        counts = []
        for rank in range(self.job.world_size):
            with contextlib.suppress(OSError, ValueError):
                counts.append(int((self.folder / f"steps-{rank}").read_text() or 0))
        return counts

    def wait_for_step(self, step: int, timeout_s: float = 60.0) -> None:
        """Until every rank has done so many steps; RuntimeError when a worker ends or the time is over."""
        deadline = time.monotonic() + timeout_s
        while len(done := self.steps()) < self.job.world_size or min(done) < step:
            dead = [rank for rank, process in enumerate(self.processes) if not process.is_alive()]
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"the workers did not reach step {step}: {done}, ended: {dead}")
            time.sleep(0.02)

    def end(self) -> None:
        """Kill all; their rings and files go too."""
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                process.kill()
        for process in self.processes:
            process.join(timeout=10)
        for path in self.rings.glob(f"{self.run}.g{self.number}.*"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def training(run: str, number: int, job: Job, rings: Path, nodes: int = 2):  # type: ignore[no-untyped-def]
    """``with training(...) as workers:`` a set of workers that train until it is left."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    folder = Path(tempfile.mkdtemp(prefix="c4live"))
    workers = WorkerSet(run, number, folder, rings, job, nodes)
    workers.control.mkdir()
    try:
        for rank in range(job.world_size):
            process = context.Process(
                target=work, args=(rank, run, number, job, str(folder), str(rings)), daemon=True, name=f"rank-{rank}"
            )
            process.start()
            workers.processes.append(process)
        yield workers
    finally:
        workers.end()


def work(rank: int, run: str, number: int, job: Job, folder: str, rings: str) -> None:
    """One worker, until it is killed."""
    import faulthandler
    import sys

    os.environ["OMP_NUM_THREADS"] = "1"
    log = Path(folder, f"log-{rank}").open("w", buffering=1)  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(file=sys.stderr)
    import torch
    import torch.distributed as dist

    from actors.c4.injection import hook
    from actors.c4.recorder.backend import register_backend, start_recording
    from actors.c4.recorder.group import C4Group
    from actors.c4.recorder.recorder import RecordingConfig

    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    register_backend()
    recorder = start_recording(
        RecordingConfig(
            run=run, generation=number, rank=rank, world_size=job.world_size, directory=rings, required=True
        )
    )
    if recorder.path is None:
        raise RuntimeError("the worker has no ring")
    hook.install(Path(folder, "control"), C4Group, hook.ring_mark(recorder.path))
    try:
        dist.init_process_group("c4", init_method=f"file://{folder}/store", rank=rank, world_size=job.world_size)
        _train(rank, job, Path(folder))
    except Exception:
        # As a worker of Ray Train does whose loop has raised: it lives on until it is told to end.
        traceback.print_exc()
        time.sleep(86400)


def _train(rank: int, job: Job, folder: Path) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn

    from actors.c4.injection.hook import hold_gil

    width = job.width
    model = nn.Sequential(
        nn.Linear(64, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 8),
    )
    teacher = nn.Linear(64, 8)
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=job.bucket_mib)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(1000 + rank)
    shared, own = random.Random(job.seed), random.Random(job.seed * 1000 + rank)
    durations: list[float] = []
    progress = (folder / f"steps-{rank}").open("w")
    step = 0
    while True:
        began = time.monotonic()
        time.sleep(job.device_s)
        inputs = torch.randn(job.batch, 64, generator=generator)
        with torch.no_grad():
            targets = teacher(inputs).sin()
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(wrapped(inputs), targets)
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        step += 1
        durations = [*durations[-50:], time.monotonic() - began]
        progress.seek(0)
        progress.write(f"{step:>12}")
        progress.flush()
        median_s = sorted(durations)[len(durations) // 2]
        if step < 20:
            continue
        if job.evaluate_every and step % job.evaluate_every == 0:
            until = time.monotonic() + shared.uniform(*job.pause) * median_s
            with torch.no_grad():
                while time.monotonic() < until:
                    model(inputs)
        if job.checkpoint_every and step % job.checkpoint_every == job.checkpoint_every // 2:
            until = time.monotonic() + shared.uniform(*job.pause) * median_s
            if rank == 0:
                torch.save(model.state_dict(), folder / "checkpoint.pt")
                time.sleep(max(0.0, until - time.monotonic()))  # a slow disk
        if job.collect_every and step % job.collect_every == (7 * rank + 3) % job.collect_every:
            until = time.monotonic() + own.uniform(*job.pause) * median_s
            gc.collect()
            hold_gil(until - time.monotonic())


__all__ = ["Job", "WorkerSet", "processes", "training", "work"]
