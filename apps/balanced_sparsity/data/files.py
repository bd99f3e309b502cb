"""Files of a data set in name order, from a folder or from a tar archive of it, read one after the other."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from apps.program.errors import UserError


def read_files(path: str | Path, suffixes: tuple[str, ...], how_to_get: str) -> list[tuple[PurePosixPath, bytes]]:
    """(path inside, bytes) of the files whose names end as given (case does not matter), sorted by path.

    Args:
        path: a folder, or an archive that ``tarfile`` reads (.tar, .tar.gz, .tar.xz).
        how_to_get: a sentence for the one who does not have the data.

    Raises:
        UserError: nothing there, no such files in it, or it cannot be read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"There is no data at {path}. {how_to_get}")
    try:
        found = sorted(_of_folder(path, suffixes) if path.is_dir() else _of_archive(path, suffixes))
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if not found:
        raise UserError(f"{path} holds no {' or '.join(suffixes)} files. {how_to_get}")
    return found


def _of_folder(path: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[PurePosixPath, bytes]]:
    for file in path.rglob("*"):
        if file.is_file() and file.name.lower().endswith(suffixes):
            yield PurePosixPath(file.relative_to(path).as_posix()), file.read_bytes()


def _of_archive(path: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[PurePosixPath, bytes]]:
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            if member.isfile() and member.name.lower().endswith(suffixes):
                file = archive.extractfile(member)
                if file is not None:
                    yield PurePosixPath(member.name), file.read()
