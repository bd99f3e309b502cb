"""What a killed run leaves in shared memory is freed by the next keeper on the node, and nothing else is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.c4.recovery.keeper import Keeper
from actors.c4.recovery.memory import REPORTS, PartFolder, clean_stale
from actors.c4.recovery.parts import Part, PartId, Version

SCRIPT = """
import sys
from actors.c4.recovery.keeper import Keeper
Keeper(sys.argv[2], sys.argv[1], "node0")
"""


def left_by_a_dead_keeper(root: Path, run: str, age_s: float) -> Path:
    subprocess.run([sys.executable, "-c", SCRIPT, str(root), run], check=True)
    part = Part(PartId(Version(3, 1), 0, 1), {"weights": b"x" * 100}, {})
    PartFolder(root, run, "node0", REPORTS).store(part)
    folder = root / f"sextant-c4-{run}" / "node0"
    then = time.time() - age_s
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (then, then))
    return folder


def test_only_what_nobody_owns_and_nobody_wrote_to_lately_is_removed(tmp_path: Path) -> None:
    old = left_by_a_dead_keeper(tmp_path, "old", age_s=7200)
    fresh = left_by_a_dead_keeper(tmp_path, "fresh", age_s=60)  # its keeper may be about to start again
    living = Keeper("living", str(tmp_path), "node0")  # removes ``old`` as it starts
    then = time.time() - 7200
    for path in (tmp_path / "sextant-c4-living").rglob("*"):
        os.utime(path, (then, then))
    stranger = tmp_path / "sextant-c4-other" / "node0"
    stranger.mkdir(parents=True)
    assert not old.parent.exists()
    assert fresh.exists()
    assert clean_stale(tmp_path) == []
    assert (tmp_path / "sextant-c4-living" / "node0").exists()
    assert stranger.exists()
    living.forget()
    assert not (tmp_path / "sextant-c4-living").exists()


def test_a_version_that_another_rank_prunes_meanwhile_is_just_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker looks at the inventory in every report: what it raises would reach the user's loop."""
    folder = PartFolder(tmp_path, "run", "node0", REPORTS)
    ids = [PartId(Version(1, number), 0, 1) for number in (1, 2, 3)]
    for one in ids:
        folder.store(Part(one, {"weights": b"x"}, {}))
    listed = os.listdir

    def list_then_prune(path: Path) -> list[str]:
        names = listed(path)
        if Path(path) == folder.folder:
            shutil.rmtree(folder.folder / str(ids[1].version))
        return names

    monkeypatch.setattr(os, "listdir", list_then_prune)
    assert folder.inventory() == [ids[0], ids[2]]
    monkeypatch.undo()
    (folder.folder / "not ours").mkdir()
    (folder.folder / str(ids[0].version) / "notes.txt").write_text("not a part")
    assert folder.inventory() == [ids[0], ids[2]]
    assert PartFolder(tmp_path, "no such run", "node0", REPORTS).inventory() == []
