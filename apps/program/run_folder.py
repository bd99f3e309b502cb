"""The one run folder: ``runs/<system>/<time>/`` with ``result.json``, the resolved ``config.yaml`` and pictures."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from apps.program.config import dump_config
from apps.program.errors import UserError

__all__ = ["RunFolder", "new_run_folder"]


class RunFolder:
    """A folder that exists and belongs to one run. Files appear in it whole or not at all."""

    def __init__(self, path: Path):
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write_text(self, name: str, text: str) -> Path:
        return self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Writes a file through a temporary neighbour and a rename.

        Raises:
            UserError: no space, no permission; the neighbour is removed.
        """
        target = self.path / name
        temporary: str | None = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(target)
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            raise _cannot_write(target, error) from error
        return target

    def write_config(self, config: BaseModel) -> Path:
        """``config.yaml``: with it as ``--config`` the run can be repeated."""
        return self.write_text("config.yaml", dump_config(config))

    def write_result(self, result: Any) -> Path:
        """``result.json`` from a mapping, dataclass or pydantic model. Values that JSON lacks (nan, inf) become null."""
        text = json.dumps(to_json(result), indent=2, ensure_ascii=False, allow_nan=False)
        return self.write_text("result.json", text + "\n")


def new_run_folder(system: str, root: str | Path | None = None, config: BaseModel | None = None) -> RunFolder:
    """Makes ``<root>/<system>/<time>/`` and points ``<root>/<system>/latest`` at it.

    Args:
        system: the app's name.
        root: ``runs`` below the working folder by default, or what the environment variable SEXTANT_RUNS names.
        config: when given, written as ``config.yaml`` at once, so that a run that fails can be repeated too.

    Raises:
        UserError: the folder cannot be made or written.
    """
    base = Path(root if root is not None else os.environ.get("SEXTANT_RUNS") or "runs").expanduser() / system
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        base.mkdir(parents=True, exist_ok=True)
        path = _make_new(base, stamp)
    except OSError as error:
        raise _cannot_write(base, error) from error
    _point_latest(base, path)
    folder = RunFolder(path)
    if config is not None:
        folder.write_config(config)
    return folder


def to_json(value: Any) -> Any:
    """``value`` as JSON knows it: dataclasses and models become objects, tuples and sets lists, paths text, nan null."""
    if isinstance(value, BaseModel):
        return to_json(value.model_dump(mode="json"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((to_json(item) for item in value), key=str)
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy arrays and scalars, torch tensors
        return to_json(value.tolist())
    return str(value)


def _make_new(base: Path, stamp: str) -> Path:
    """mkdir is atomic: of two runs that start in the same second one gets the name, the other the next number."""
    number = 0
    while True:
        path = base / (stamp if number == 0 else f"{stamp}-{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def _point_latest(base: Path, path: Path) -> None:
    """Best effort: some file systems know no symbolic links, and a folder named latest is the user's."""
    link = base / "latest"
    if link.exists() and not link.is_symlink():
        return
    temporary = base / f".latest.{path.name}.{os.getpid()}"
    try:
        temporary.symlink_to(path.name, target_is_directory=True)
        temporary.replace(link)
    except OSError:
        temporary.unlink(missing_ok=True)


def _cannot_write(path: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"The disk is full: {path} could not be written; free some space or choose another run folder."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"No permission to write {path}; choose another run folder (SEXTANT_RUNS=FOLDER).")
    return UserError(f"{path} could not be written: {error.strerror or error}.")
