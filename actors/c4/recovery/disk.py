"""The disk tier: parts written into a checkpoint's directory on the run's storage, with manifests that say what is whole.

A directory that C4 began is whole when every rank's manifest is there and every file has its size and checksum. Files appear
under a temporary name first. Works on any ``pyarrow.fs`` filesystem. No Ray.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from typing import Any

import pyarrow.fs as pafs

from actors.c4.recovery.parts import Part

MANIFESTS = ".c4"
_BEGUN = "begun"


def begin(filesystem: pafs.FileSystem, folder: str) -> None:
    """Marks a checkpoint's directory as C4's, before anything is in it.

    Raises:
        OSError: no space or no access.
    """
    filesystem.create_dir(f"{folder}/{MANIFESTS}", recursive=True)
    with filesystem.open_output_stream(f"{folder}/{MANIFESTS}/{_BEGUN}"):
        pass


def write_part(filesystem: pafs.FileSystem, folder: str, part: Part) -> int:
    """Writes one rank's files and, last, its manifest; returns bytes.

    Raises:
        OSError: no space or no access; the directory then is not whole.
    """
    filesystem.create_dir(f"{folder}/{MANIFESTS}", recursive=True)
    entries, written = [], 0
    made: set[str] = set()
    for path, data in part.files.items():
        view = memoryview(data).cast("B")
        target = f"{folder}/{path}"
        parent = target.rpartition("/")[0]
        if parent not in made:
            filesystem.create_dir(parent, recursive=True)
            made.add(parent)
        _write(filesystem, target, view, part.id.rank)
        entries.append([path, view.nbytes, zlib.crc32(view)])
        written += view.nbytes
    manifest = json.dumps({"rank": part.id.rank, "world_size": part.id.world_size, "files": entries}).encode()
    _write(filesystem, f"{folder}/{MANIFESTS}/rank-{part.id.rank:06d}.json", memoryview(manifest), part.id.rank)
    return written


def is_whole(filesystem: pafs.FileSystem, folder: str) -> bool:
    """Whether a checkpoint's directory can be used: all manifests there, every file as written.

    A directory without C4's marks was made by something else (Ray Train's own upload): it counts when it exists.
    """
    if filesystem.get_file_info(folder).type != pafs.FileType.Directory:
        return False
    marks = pafs.FileSelector(f"{folder}/{MANIFESTS}", allow_not_found=True)
    names = [info.path for info in filesystem.get_file_info(marks)]
    if not names:
        return True
    manifests = []
    for path in names:
        if not path.endswith(".json"):
            continue
        try:
            manifests.append(json.loads(_read(filesystem, path)))
        except (OSError, ValueError):
            return False
    worlds = {manifest["world_size"] for manifest in manifests}
    if len(worlds) != 1 or {manifest["rank"] for manifest in manifests} != set(range(worlds.pop())):
        return False
    return all(
        _intact(filesystem, f"{folder}/{path}", nbytes, checksum)
        for manifest in manifests
        for path, nbytes, checksum in manifest["files"]
    )


def exists(filesystem: pafs.FileSystem, folder: str) -> bool:
    return filesystem.get_file_info(folder).type == pafs.FileType.Directory


def _intact(filesystem: pafs.FileSystem, path: str, nbytes: int, checksum: int) -> bool:
    try:
        data = _read(filesystem, path)
    except OSError:
        return False
    return len(data) == nbytes and zlib.crc32(data) == checksum


def _read(filesystem: pafs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def _write(filesystem: pafs.FileSystem, target: str, data: memoryview, rank: int) -> None:
    folder, _, name = target.rpartition("/")
    temporary = f"{folder}/.{name}.{rank}.tmp"
    try:
        with filesystem.open_output_stream(temporary) as stream:
            stream.write(_buffer(data))
        filesystem.move(temporary, target)
    except OSError:
        with contextlib.suppress(OSError):  # it was never made
            filesystem.delete_file(temporary)
        raise


def _buffer(data: memoryview) -> Any:
    import pyarrow

    return pyarrow.py_buffer(data)
