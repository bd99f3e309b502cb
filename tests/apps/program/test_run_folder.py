"""Run folders: no collisions, whole files or none, sentences when the disk refuses."""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from apps.program.config import Config, load_config
from apps.program.errors import UserError
from apps.program.run_folder import RunFolder, new_run_folder, to_json


class Settings(Config):
    name: str = "x"


@dataclass(frozen=True)
class Outcome:
    latency_ms: float
    where: Path


def test_layout_and_latest(tmp_path: Path) -> None:
    first = new_run_folder("demo", tmp_path, Settings(name="kept"))
    second = new_run_folder("demo", tmp_path)
    assert first.path.parent == second.path.parent == tmp_path / "demo"
    assert first.path != second.path
    assert (tmp_path / "demo" / "latest").resolve() == second.path.resolve()
    assert load_config(Settings, first / "config.yaml") == Settings(name="kept")


def test_runs_that_start_together_get_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_run_folder("demo", tmp_path).path, range(40)))
    assert len(set(folders)) == 40
    assert (tmp_path / "demo" / "latest").resolve() in {folder.resolve() for folder in folders}
    assert not [path for path in (tmp_path / "demo").iterdir() if path.name.startswith(".")]


def test_the_root_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEXTANT_RUNS", str(tmp_path / "elsewhere"))
    assert new_run_folder("demo").path.parent == tmp_path / "elsewhere" / "demo"


def test_a_folder_named_latest_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo" / "latest").mkdir(parents=True)
    new_run_folder("demo", tmp_path)
    assert (tmp_path / "demo" / "latest").is_dir()
    assert not (tmp_path / "demo" / "latest").is_symlink()


def test_result_is_json(tmp_path: Path) -> None:
    folder = new_run_folder("demo", tmp_path)
    folder.write_result({"outcome": Outcome(1.5, Path("a")), "nan": float("nan"), "array": np.arange(3), "set": {2, 1}})
    assert json.loads((folder / "result.json").read_text()) == {
        "outcome": {"latency_ms": 1.5, "where": "a"},
        "nan": None,
        "array": [0, 1, 2],
        "set": [1, 2],
    }


def test_to_json_of_models_and_scalars() -> None:
    assert to_json(Settings(name="m")) == {"name": "m"}
    assert to_json((np.float32(0.5), float("inf"), None, True)) == [0.5, None, None, True]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_run_folder("demo", tmp_path)
    folder.write_text("result.json", "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"disk is full: .*result\.json"):
        folder.write_text("result.json", "new")
    assert (folder / "result.json").read_text() == "old"
    assert [path.name for path in folder.path.iterdir()] == ["result.json"]


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        new_run_folder("demo", tmp_path / "runs")


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="No permission to write"):
        new_run_folder("demo", tmp_path)


def test_it_is_a_path(run_folder: RunFolder) -> None:
    assert Path(run_folder) == run_folder.path
    assert str(run_folder / "a") == f"{run_folder}/a"
