"""Runs a function in several processes that form one job, as launchers do: each result, or what was raised, comes back."""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How a rank ended: with a value, with an error's text, or by a signal (both None)."""

    value: Any = None
    error: str | None = None


def run_ranks(
    size: int, function: Callable[..., Any], folder: Path, *arguments: Any, limit_s: float = 120.0, timeout_s: float = 60.0,
    backend: str = "c4", options: dict[str, Any] | None = None,
) -> list[Ended]:  # fmt: skip
    """``function(rank, size, *arguments)`` in ``size`` processes with a process group; all are dead afterwards."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as place:
        workers = [
            context.Process(
                target=_rank,
                args=(
                    rank,
                    size,
                    f"{place}/store",
                    str(folder),
                    answers,
                    function,
                    arguments,
                    timeout_s,
                    backend,
                    options or {},
                ),
                daemon=True,
            )
            for rank in range(size)
        ]
        for worker in workers:
            worker.start()
        found: dict[int, Ended] = {}
        deadline = time.monotonic() + limit_s
        try:
            while len(found) < size and time.monotonic() < deadline:
                try:
                    rank, ended = answers.get(timeout=0.1)
                    found[rank] = ended
                except queue.Empty:
                    for rank, worker in enumerate(workers):
                        if rank not in found and worker.exitcode not in (None, 0):
                            found[rank] = Ended()
            for rank in set(range(size)) - set(found):
                found[rank] = Ended(error=f"did not end in time\n{_stack(folder, workers[rank].pid)}")
        finally:
            for worker in workers:
                worker.join(timeout=10 if all(one.error is None for one in found.values()) else 0.1)
                if worker.is_alive():
                    worker.kill()
                    worker.join()
    return [found[rank] for rank in range(size)]


def _stack(folder: Path, pid: int | None) -> str:
    from actors.c4.recorder.files import dump_stack
    from actors.c4.recorder.reader import RingReader, discover

    for found in discover(folder):
        if found.pid == pid:
            with RingReader(found.path) as reader:
                return dump_stack(found.path, reader.identity)
    return ""


def _rank(
    rank: int, size: int, store: str, folder: str, answers: Any, function: Callable[..., Any], arguments: Any, timeout_s: float,
    backend: str, options: dict[str, Any],
) -> None:  # fmt: skip
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    import torch
    import torch.distributed as dist

    from actors.c4.recorder.backend import register_backend, start_recording
    from actors.c4.recorder.recorder import RecordingConfig
    from actors.c4.recorder.transport import RingOptions

    torch.set_num_threads(1)
    try:
        register_backend()
        start_recording(RecordingConfig("test", 1, rank, size, directory=folder, required=True), RingOptions(**options))
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
        )
        value = function(rank, size, *arguments)
        answers.put((rank, Ended(value)))
        answers.close()
        answers.join_thread()
        # Whoever is first to leave takes its sockets along: the others may still be in their last operation.
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        answers.put((rank, Ended(error=traceback.format_exc())))
        answers.close()
        answers.join_thread()
