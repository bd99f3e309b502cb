"""A training checkpoint as a folder: ``state.pt`` (model, optimizer, step, what else), ``rank-N.pt`` (generators, carried state).

Both hold tensors, numbers, text, lists and dicts alone, so that they are read without trusting a pickle.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from apps.program.errors import UserError

STATE_FILE = "state.pt"


def save_tensors(path: Path, content: Any) -> None:
    """``torch.save`` through a temporary neighbour: the file appears whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def load_tensors(path: Path, device: torch.device | str = "cpu") -> Any:
    """What ``save_tensors`` wrote. No code of the file is run.

    Raises:
        UserError: there is no such file, or it is no checkpoint.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"There is no checkpoint {path}.") from error
    except Exception as error:  # torch raises whatever its readers do; in each case the file is a foreign one
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no checkpoint that can be read: {why}") from error


def random_states() -> dict[str, Any]:
    """States of torch's generators: the CPU's, and each GPU's where CUDA is in use."""
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Puts back what ``random_states`` took."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def write_checkpoint(folder: Path, rank: int, common: dict[str, Any] | None, own: dict[str, Any]) -> None:
    """A rank's part: ``common`` (rank 0 gives it, the others None) and what is the rank's own, with its generators."""
    save_tensors(folder / f"rank-{rank}.pt", {"own": own, "random": random_states()})
    if common is not None:
        save_tensors(folder / STATE_FILE, common)


def read_checkpoint(folder: Path, rank: int, device: torch.device | str = "cpu") -> tuple[Any, Any | None]:
    """(common, own) of ``write_checkpoint``; puts the generators back. ``own`` is None for a rank that had no part in it,

    as after a start with more workers; its generators are then left as they are.
    """
    common = load_tensors(folder / STATE_FILE, device)
    path = folder / f"rank-{rank}.pt"
    if not path.exists():
        return common, None
    mine = load_tensors(path, device)
    set_random_states(mine["random"])
    return common, mine["own"]


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for the files of one checkpoint on their way."""
    with tempfile.TemporaryDirectory(prefix="sextant-checkpoint-") as folder:
        yield Path(folder)


def keep_newest(root: Path, prefix: str, count: int) -> None:
    """Removes all but the ``count`` newest of the folders ``<prefix>N``, and those that were never finished."""
    for folder in numbered(root, prefix)[:-count]:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in root.glob(f".{prefix}*"):
        shutil.rmtree(folder, ignore_errors=True)


def numbered(root: Path, prefix: str) -> list[Path]:
    """The folders ``<prefix>N`` in ``root``, by N."""
    found = [path for path in root.glob(f"{prefix}*") if path.name[len(prefix) :].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[len(prefix) :]))
