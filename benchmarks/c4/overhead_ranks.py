"""What the ranks of ``benchmarks.c4_overhead`` run: groups of both kinds in the same processes, timed in alternation."""

from __future__ import annotations

import multiprocessing
import os
import queue
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT_S = 300.0


class RanksError(RuntimeError):
    """A rank failed; the message holds its traceback."""


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any, limit_s: float = 3600.0) -> list[Any]:
    """``function(rank, size, *arguments)`` in ``size`` processes of one thread each; all are dead afterwards.

    Raises:
        RanksError: one raised, was killed, or did not end in time.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where rings are in real runs
    with tempfile.TemporaryDirectory(prefix="c4overhead", dir=shared) as folder:
        processes = [
            context.Process(target=_rank, args=(rank, size, folder, answers, function, arguments), daemon=True)
            for rank in range(size)
        ]
        try:
            for process in processes:
                process.start()
            found: dict[int, Any] = {}
            deadline = time.monotonic() + limit_s
            while len(found) < size:
                try:
                    rank, value, error = answers.get(timeout=0.5)
                except queue.Empty:
                    died = [
                        rank for rank, one in enumerate(processes) if rank not in found and one.exitcode is not None
                    ]
                    if died or time.monotonic() > deadline:
                        raise RanksError(
                            f"ranks {died} ended without a word" if died else "the ranks take too long"
                        ) from None
                    continue
                if error:
                    raise RanksError(f"rank {rank} failed:\n{error}")
                found[rank] = value
            for process in processes:
                process.join(timeout=20)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join(timeout=10)
    return [found[rank] for rank in range(size)]


def _rank(
    rank: int, size: int, folder: str, answers: Any, function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    os.environ.update(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", SEXTANT_C4_DIR=f"{folder}/rings")
    import torch
    import torch.distributed as dist

    from actors.c4.recorder.backend import register_backend, start_recording, stop_recording
    from actors.c4.recorder.recorder import RecordingConfig

    torch.set_num_threads(1)
    try:
        register_backend()
        start_recording(RecordingConfig("overhead", 0, rank, size, required=True))
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        value = function(rank, size, *arguments)
        dist.barrier()
        dist.destroy_process_group()
        stop_recording()
        answers.put((rank, value, None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
    answers.close()
    answers.join_thread()


def new_groups(arms: Sequence[str]) -> dict[str, Any]:
    """A group of all ranks for each arm: gloo (any name that begins so), c4, c4_rotated or c4_python."""
    import torch.distributed as dist

    from actors.c4.recorder.backend import recorder, start_recording
    from actors.c4.recorder.transport import RingOptions

    groups = {}
    for arm in arms:
        if arm.startswith("gloo"):
            groups[arm] = dist.new_group(backend="gloo")
            continue
        current = recorder()
        if current is None:
            raise RuntimeError("recording has not begun")
        start_recording(
            current.config,
            RingOptions(algorithm="rotated" if arm == "c4_rotated" else "ordered", native=arm != "c4_python"),
        )
        groups[arm] = dist.new_group(backend="c4")
    return groups


def time_all_reduces(
    rank: int, size: int, arms: Sequence[str], payloads: Sequence[int], rounds: int
) -> dict[int, dict[str, Any]]:
    """Seconds of a waited all-reduce of float32, per payload in bytes and arm, one value a round in changing order."""
    import torch
    import torch.distributed as dist

    groups = new_groups(arms)
    found: dict[int, dict[str, tuple[float, ...]]] = {}
    for payload in payloads:
        tensor = torch.ones(payload // 4)
        calls = max(1, min(50, (1 << 20) // payload))
        values: dict[str, list[float]] = {arm: [] for arm in arms}
        for number in range(rounds + 2):
            order = list(arms) if number % 2 == 0 else list(arms)[::-1]
            for arm in order:
                tensor.fill_(1.0)
                dist.barrier()
                began = time.perf_counter()
                for _ in range(calls):
                    dist.all_reduce(tensor, group=groups[arm])
                if number >= 2:
                    values[arm].append((time.perf_counter() - began) / calls)
        found[payload] = {arm: tuple(one) for arm, one in values.items()}
    return found


def time_ddp(
    rank: int, size: int, arms: Sequence[str], rounds: int, block: int, target_s: float
) -> tuple[dict[str, tuple[float, ...]], int, int]:
    """Seconds of a DDP step, per arm one value a round: the mean of a block of steps. Also the batch and the gradients' bytes.

    The arms are DDPs of equal networks over groups of their own, in the same processes; their order is drawn anew each round
    (alike at all ranks). The batch is chosen so that a step takes ``target_s`` or more.
    """
    import torch
    import torch.distributed as dist
    from torch import nn

    groups = new_groups(arms)
    models = {}
    for arm in arms:
        torch.manual_seed(0)
        layers = [part for _ in range(6) for part in (nn.Linear(768, 768), nn.GELU())]
        net = nn.Sequential(*layers)
        model = nn.parallel.DistributedDataParallel(net, process_group=groups[arm], bucket_cap_mb=4)
        models[arm] = (model, torch.optim.SGD(model.parameters(), lr=1e-3))
    gradient_bytes = sum(4 * parameter.numel() for parameter in net.parameters())

    def step(arm: str, batch: torch.Tensor) -> None:
        model, optimizer = models[arm]
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    rows = 64
    while True:
        batch = torch.randn(rows, 768, generator=torch.Generator().manual_seed(rank))
        for arm in arms:
            step(arm, batch)
        began = time.perf_counter()
        for _ in range(3):
            step(arms[0], batch)
        took = torch.tensor((time.perf_counter() - began) / 3)
        dist.all_reduce(took, op=dist.ReduceOp.MIN)
        if took.item() >= target_s or rows >= 1 << 16:
            break
        rows = int(rows * min(4.0, max(1.2, 1.1 * target_s / took.item())))
    order = list(arms)
    shuffle = random.Random(0)
    values: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        shuffle.shuffle(order)
        for arm in order:
            dist.barrier()
            began = time.perf_counter()
            for _ in range(block):
                step(arm, batch)
            values[arm].append((time.perf_counter() - began) / block)
    return {arm: tuple(one) for arm, one in values.items()}, rows, gradient_bytes
