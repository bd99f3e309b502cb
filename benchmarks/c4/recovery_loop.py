"""The training loop of the recovery benchmark, as a user would write it: a small network on scikit-learn's digits, DDP, dropout.

It reports a checkpoint every step. Beside that it writes when each step ended (the benchmark reads these files), and can be told
to lock the GIL for ever, which is one of the faults.
"""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import ray.train
import torch
from ray.train import Checkpoint
from sklearn.datasets import load_digits

BATCH = 32
"""Samples a rank and step."""


def train(config: dict[str, Any]) -> None:
    """``config``: folder (of the records), step_s (least duration of a step), steps (None: until the file ``stop`` says)."""
    folder, context = Path(config["folder"]), ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    record = (folder / f"rank{rank}-{os.getpid()}.jsonl").open("a", buffering=1)

    def note(event: str, **fields: Any) -> None:
        record.write(json.dumps({"event": event, "at": time.time(), "rank": rank, "pid": os.getpid(), **fields}) + "\n")

    note("start", born=psutil.Process().create_time())
    threading.Thread(target=_lock_when_told, args=(folder / f"gil-{rank}",), daemon=True).start()
    torch.set_num_threads(1)
    torch.manual_seed(1000 + rank)  # each rank drops other units
    images, digits = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(digits)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(256, 128), torch.nn.ReLU(),
        torch.nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    first = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as path:
            state = torch.load(Path(path) / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"] + 1
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    note("ready", step=first)
    step = first
    while step < _last(config, folder):
        began = time.perf_counter()
        order = torch.Generator().manual_seed(step)  # the position in the data is the step
        chosen = torch.randint(0, len(inputs), (BATCH * world_size,), generator=order)[rank::world_size]
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(ddp(inputs[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
        time.sleep(max(0.0, config["step_s"] - (time.perf_counter() - began)))
        with tempfile.TemporaryDirectory() as path:
            reported = None
            if rank == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, Path(path) / "state.pt")
                reported = Checkpoint.from_directory(path)
            ray.train.report({"step": step, "loss": loss.item()}, checkpoint=reported)
        note("step", step=step, loss=loss.item())
        step += 1


def _last(config: dict[str, Any], folder: Path) -> int:
    if config["steps"] is not None:
        return int(config["steps"])
    try:
        return int((folder / "stop").read_text())
    except (OSError, ValueError):
        return 10**9


def _lock_when_told(file: Path) -> None:
    while not file.exists():
        time.sleep(0.02)
    file.unlink(missing_ok=True)
    ctypes.PyDLL(None).sleep(10**6)  # PyDLL keeps the GIL while it sleeps
