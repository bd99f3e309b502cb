"""The demo's training loop: a small convolutional network on scikit-learn's handwritten digits, as any Ray Train user writes it.

It knows nothing of C4. It reports a checkpoint with every step, and goes on from the one that Ray Train hands it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import prepare_model
from torch import nn

HELD_OUT = 297
"""Digits that are only evaluated: the last ones, of other writers."""


def digits_network(width: int, seed: int) -> nn.Module:
    """8 x 8 pixels to ten classes; its weights depend on ``seed`` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(8 * width, 10),
        )  # fmt: skip


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [1797, 1, 8, 8] in 0 to 1, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(data.target, dtype=torch.int64)


def batch_indices(step: int, batch: int, examples: int, seed: int) -> torch.Tensor:
    """Indices of the global batch of a step: epoch after epoch, each in an order of its own, so that ``step`` is the position."""
    per_epoch = examples // batch
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[place * batch : (place + 1) * batch]


def train_digits(config: dict[str, Any]) -> None:
    """Ray Train's loop.

    ``config``: steps, batch (of all workers together), width, learning_rate, seed, and optionally stop_file: once it exists,
    the training ends with the next step.
    """
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(1)
    images, labels = digits()
    train_count = len(images) - HELD_OUT
    model = prepare_model(digits_network(config["width"], config["seed"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["learning_rate"])
    step = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        torch.manual_seed(config["seed"] * 1000 + rank)
    else:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", weights_only=True)
            _network(model).load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(torch.load(Path(folder) / f"random-{rank}.pt", weights_only=True))
            step = state["step"]
    share = config["batch"] // world_size
    generation = int(os.environ.get("SEXTANT_C4_GENERATION", "0"))
    stop = Path(config["stop_file"]) if config.get("stop_file") else None
    ended = step >= config["steps"]
    while not ended:
        mine = batch_indices(step, config["batch"], train_count, config["seed"])[rank * share : (rank + 1) * share]
        model.train()
        loss = nn.functional.cross_entropy(model(images[mine]), labels[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        # Summed over the workers: the loss, and whether rank 0 has been asked to stop.
        told = torch.tensor([float(loss), float(rank == 0 and stop is not None and stop.exists())])
        torch.distributed.all_reduce(told)
        ended = step == config["steps"] or float(told[1]) > 0
        metrics = {"step": step, "loss": float(told[0]) / world_size, "generation": generation}
        if ended:
            metrics["accuracy"] = _accuracy(model, images[train_count:], labels[train_count:])
        _report(metrics, model, optimizer, step, rank)


def _report(
    metrics: dict[str, float], model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(torch.get_rng_state(), Path(folder) / f"random-{rank}.pt")
        if rank == 0:
            state = {"model": _network(model).state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, Path(folder) / "state.pt")
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _network(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((_network(model)(images).argmax(1) == labels).float().mean())
