"""The memory tier of one node: parts as files in shared memory, written by workers and by the node's keeper. No Ray.

A worker that dies, hangs or is killed leaves what it stored. A file appears under its name only when it is written whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from actors.c4 import processes
from actors.c4.diagnosis.observation import ProcessState
from actors.c4.recovery.parts import Part, PartError, PartId, Version, pack, superseded, unpack

_OWNER = "owner"
REPORTS = "report"
"""Channel of checkpoints that the loop reported."""
STATES = "state"
"""Channel of ``StepState``."""


def memory_root(setting: str | None) -> Path:
    """Folder of the memory tier: the one set, else shared memory, else the temporary folder (then it is a disk, said so once)."""
    if setting:
        return Path(setting)
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


class PartFolder:
    """Parts of one channel on one node. Several processes may write; a part has one writer."""

    def __init__(self, root: Path, run: str, node_id: str, channel: str):
        self.folder = root / f"sextant-c4-{run}" / node_id / channel

    def store(self, part: Part) -> int:
        """Writes a part; returns its bytes.

        Raises:
            OSError: no space or no access; nothing appears.
        """
        return self.store_packed(part.id, pack(part))

    def store_packed(self, part_id: PartId, pieces: Sequence[bytes | memoryview]) -> int:
        target = self.path(part_id)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb", buffering=0) as file:
                written = sum(_write_all(file, piece) for piece in pieces)
            temporary.replace(target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return written

    def path(self, part_id: PartId) -> Path:
        return self.folder / str(part_id.version) / f"{part_id.rank:06d}-{part_id.world_size:06d}.part"

    def inventory(self) -> list[PartId]:
        """Parts that are here, not yet checked."""
        found = []
        for folder in _entries(self.folder):
            for name in _entries(self.folder / folder):
                rank, _, world_size = name.removesuffix(".part").partition("-")
                try:
                    if name.endswith(".part"):
                        found.append(PartId(Version.parse(folder), int(rank), int(world_size)))
                except ValueError:
                    continue  # not ours
        return found

    def read(self, part_id: PartId) -> bytes:
        """A part's bytes, checked.

        Raises:
            PartError: it is missing or damaged.
        """
        try:
            data = self.path(part_id).read_bytes()
        except OSError as error:
            raise PartError(f"The part of rank {part_id.rank} in version {part_id.version} is gone: {error}") from error
        if unpack(data).id != part_id:
            raise PartError(f"The file of rank {part_id.rank} in version {part_id.version} holds another part.")
        return data

    def prune(self, rank: int, keep: int) -> None:
        """Deletes this rank's parts but those of its ``keep`` newest versions."""
        mine = [part for part in self.inventory() if part.rank == rank]
        old = set(superseded([part.version for part in mine], keep))
        for part in mine:
            if part.version in old:
                self.path(part).unlink(missing_ok=True)
                remove_if_empty(self.path(part).parent)

    def prune_before(self, version: Version) -> None:
        """Deletes every part of an older version, whoever wrote it."""
        for part in self.inventory():
            if part.version < version:
                self.path(part).unlink(missing_ok=True)
                remove_if_empty(self.path(part).parent)


def _entries(folder: Path) -> list[str]:
    """Names in a folder, sorted; none when it is gone: others prune while we look."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # others still have parts in it, or it went already


def remove_run(root: Path, run: str, node_id: str) -> None:
    """Deletes everything that a run keeps on this node."""
    shutil.rmtree(root / f"sextant-c4-{run}" / node_id, ignore_errors=True)
    remove_if_empty(root / f"sextant-c4-{run}")


def own(root: Path, run: str, node_id: str) -> None:
    """Notes this process as the one for which a run's folder on this node stands (see ``clean_stale``)."""
    folder = root / f"sextant-c4-{run}" / node_id
    folder.mkdir(parents=True, exist_ok=True)
    facts = processes.look(os.getpid())
    (folder / _OWNER).write_text(f"{os.getpid()} {facts.started_ticks if facts else 0}")


def clean_stale(root: Path, keep_s: float = 3600.0) -> list[Path]:
    """Removes what runs left whose keeper was killed and not started again: nothing else frees shared memory.

    Args:
        root: of the memory tier.
        keep_s: folders in which something was written within this time stay, whoever lives.

    Returns:
        The folders that were removed.
    """
    removed = []
    for owner in root.glob(f"sextant-c4-*/*/{_OWNER}"):
        try:
            pid, ticks = map(int, owner.read_text().split())
            newest = max(path.lstat().st_mtime for path in (owner, *owner.parent.rglob("*")))
            mine = owner.stat().st_uid == os.getuid()
        except (OSError, ValueError):
            continue  # it goes just now, or is not ours
        if mine and processes.state_of(pid, ticks) is ProcessState.GONE and time.time() - newest > keep_s:
            shutil.rmtree(owner.parent, ignore_errors=True)
            remove_if_empty(owner.parent.parent)
            removed.append(owner.parent)
    return removed


def _write_all(file: object, piece: bytes | memoryview) -> int:
    view = memoryview(piece).cast("B")
    done = 0
    while done < view.nbytes:  # a raw write may be short; on a full disk it raises
        done += file.write(view[done:])  # type: ignore[attr-defined]
    return done
