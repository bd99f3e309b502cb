"""A checkpoint's part: what one rank stored for one version, as one checked block of bytes. No Ray, no torch.

A version is whole when the parts of all ranks of its world exist somewhere; only whole versions are ever chosen. A part whose
checksum does not fit does not exist.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MAGIC = b"SXC4PART"
_FIXED = len(MAGIC) + 4 + 4  # magic, header bytes, CRC-32 of the header


class PartError(RuntimeError):
    """A part is damaged, truncated or not a part; the text says which."""


@dataclass(frozen=True, order=True)
class Version:
    """Which checkpoint: ordered by generation, then by the number that the generation counted or the loop gave."""

    generation: int
    number: int

    def __str__(self) -> str:
        return f"{self.generation:06d}-{self.number:012d}"

    @staticmethod
    def parse(text: str) -> Version:
        generation, _, number = text.partition("-")
        return Version(int(generation), int(number))


@dataclass(frozen=True, order=True)
class PartId:
    """One rank's part of one version."""

    version: Version
    rank: int
    world_size: int


@dataclass(frozen=True)
class Part:
    """Contents of a part.

    ``files``: relative POSIX path to bytes; empty when the rank had nothing to store. ``extra``: small byte strings by name
    that are not files of the checkpoint (states of random number generators).
    """

    id: PartId
    files: Mapping[str, bytes | memoryview]
    extra: Mapping[str, bytes | memoryview]


def pack(part: Part) -> list[bytes | memoryview]:
    """The part as pieces to be written one after the other (no copy of the payload)."""
    entries, pieces = [], []
    for kind, table in (("file", part.files), ("extra", part.extra)):
        for path, data in sorted(table.items()):
            view = memoryview(data).cast("B")
            entries.append([kind, path, view.nbytes, zlib.crc32(view)])
            pieces.append(view)
    header = json.dumps(
        {
            "version": str(part.id.version),
            "rank": part.id.rank,
            "world_size": part.id.world_size,
            "entries": entries,
        }
    ).encode()
    return [MAGIC + len(header).to_bytes(4, "big") + zlib.crc32(header).to_bytes(4, "big") + header, *pieces]


def unpack(data: bytes | memoryview) -> Part:
    """Contents of a packed part, as views into ``data``.

    Raises:
        PartError: it is no part, is truncated, or a checksum does not fit.
    """
    view = memoryview(data).cast("B")
    if view.nbytes < _FIXED or bytes(view[: len(MAGIC)]) != MAGIC:
        raise PartError("These bytes are not a checkpoint part.")
    length = int.from_bytes(view[len(MAGIC) : len(MAGIC) + 4], "big")
    crc = int.from_bytes(view[len(MAGIC) + 4 : _FIXED], "big")
    raw = bytes(view[_FIXED : _FIXED + length])
    if len(raw) != length or zlib.crc32(raw) != crc:
        raise PartError("The header of a checkpoint part is damaged.")
    header = json.loads(raw)
    tables: dict[str, dict[str, memoryview]] = {"file": {}, "extra": {}}
    at = _FIXED + length
    for kind, path, nbytes, checksum in header["entries"]:
        piece = view[at : at + nbytes]
        at += nbytes
        if piece.nbytes != nbytes or zlib.crc32(piece) != checksum:
            raise PartError(f"{path} of rank {header['rank']} in version {header['version']} is damaged.")
        tables[kind][path] = piece
    identity = PartId(Version.parse(header["version"]), header["rank"], header["world_size"])
    return Part(identity, tables["file"], tables["extra"])


def read_directory(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by relative POSIX path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def write_files(part: Part, folder: Path) -> None:
    """Writes the part's files below ``folder``.

    Raises:
        PartError: a path leads out of the folder.
    """
    for path, data in part.files.items():
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise PartError(f"A checkpoint part names the path {path!r}, which leads out of the checkpoint.")
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        temporary.write_bytes(data)
        temporary.replace(target)


@dataclass(frozen=True)
class Choice:
    """The version to go on from and who holds each rank's part."""

    version: Version
    world_size: int
    holders: tuple[tuple[str, ...], ...]
    """Per rank: ids of the stores that hold its part, in a stable order."""


def whole_versions(inventories: Mapping[str, Iterable[PartId]]) -> list[Choice]:
    """Versions of which every rank's part exists, newest first.

    ``inventories``: parts by store. Parts of one version that disagree on the world size never make a whole.
    """
    found: dict[tuple[Version, int], dict[int, set[str]]] = {}
    for store, parts in inventories.items():
        for part in parts:
            if 0 <= part.rank < part.world_size:
                found.setdefault((part.version, part.world_size), {}).setdefault(part.rank, set()).add(store)
    choices = [
        Choice(version, world_size, tuple(tuple(sorted(by_rank[rank])) for rank in range(world_size)))
        for (version, world_size), by_rank in found.items()
        if len(by_rank) == world_size
    ]
    return sorted(choices, key=lambda choice: choice.version, reverse=True)


def superseded(versions: Sequence[Version], keep: int) -> list[Version]:
    """All but the ``keep`` newest versions."""
    return sorted(set(versions), reverse=True)[keep:]
