"""Documents of a source: a list of items that any worker can read alone, and the reading of one item. Bad input is refused."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from apps.mcmisp.data.config import DataConfig
from apps.mcmisp.data.docstrings import corpus_version, docstrings, package_files
from apps.program.errors import UserError

TEXT = (".txt", ".md", ".rst", ".text")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
HUGGINGFACE_CHUNK = 1000


@dataclass(frozen=True)
class Item:
    """Something to read documents from: a file, or a stretch of a streamed data set."""

    name: str
    path: str
    start: int = 0
    stop: int = 0


def items_of(config: DataConfig) -> list[Item]:
    """What there is to read, in a fixed order.

    Raises:
        UserError: there is nothing.
    """
    if config.source == "docstrings":
        items = [Item(name, path) for name, path in package_files(config.packages, config.standard_library)]
        if not items:
            raise UserError("None of data.packages is installed, so that there are no docstrings to learn from.")
        return items
    if config.source == "huggingface":
        last = config.max_documents or 0
        count = -(-last // HUGGINGFACE_CHUNK)
        return [
            Item(f"{config.dataset}:{i}", str(config.dataset), i * HUGGINGFACE_CHUNK, min(last, (i + 1) * HUGGINGFACE_CHUNK))
            for i in range(count)
        ]  # fmt: skip
    root = Path(str(config.folder)).expanduser()
    if not root.is_dir():
        raise UserError(f"data.folder {root} is no folder.")
    paths = sorted(p for p in root.rglob("*") if p.is_file() and p.name.lower().endswith(TEXT + ARCHIVES))
    if not paths:
        raise UserError(f"data.folder {root} holds no text: no file that ends with {', '.join(TEXT + ARCHIVES)}.")
    return [Item(str(path.relative_to(root)), str(path)) for path in paths]


def source_version(config: DataConfig, items: list[Item]) -> str:
    """Changes when the source does: versions of packages, sizes and times of files."""
    facts: list[str] = []
    if config.source == "docstrings":
        facts = corpus_version(config.packages, config.standard_library)
    elif config.source == "folder":
        for item in items:
            status = Path(item.path).stat()
            facts.append(f"{item.name}:{status.st_size}:{status.st_mtime_ns}")
    else:
        facts = [item.name for item in items]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def read_item(item: Item, config: DataConfig) -> Iterator[str]:
    """Normalised documents of an item.

    Raises:
        UserError: a file is no text, or has a line beyond ``max_line_chars``.
    """
    for raw in _raw(item, config):
        text = normalise(raw, config.lowercase)
        if len(text.split()) >= config.min_words:
            yield text


def normalise(text: str, lowercase: bool = False) -> str:
    """NFC; control characters and runs of white space become one space; line ends are kept as spaces."""
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u00ad\u200b-\u200f\ufeff]+", " ", text)
    text = " ".join(text.split())
    return text.lower() if lowercase else text


def _raw(item: Item, config: DataConfig) -> Iterator[str]:
    if config.source == "docstrings":
        yield from docstrings(item.path)
    elif config.source == "huggingface":
        yield from _huggingface(item, config)
    elif item.path.lower().endswith(ARCHIVES):
        yield from _archive(item, config)
    else:
        yield from _documents(read_text(Path(item.path)), item.path, config)


def read_text(path: Path) -> str:
    """
    Raises:
        UserError: unreadable, or no text in UTF-8.
    """
    try:
        return _decode(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def archive_members(path: Path, endings: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(name, text) of the files in a tar archive whose names end so, in the archive's order.

    Raises:
        UserError: unreadable, or a member is no text.
    """
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and member.name.lower().endswith(endings):
                    file = archive.extractfile(member)
                    if file is not None:
                        yield member.name, _decode(file.read(), f"{path}:{member.name}")
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} is no archive that can be read: {error}.") from error


def _archive(item: Item, config: DataConfig) -> Iterator[str]:
    for name, text in archive_members(Path(item.path), TEXT):
        yield from _documents(text, f"{item.path}:{name}", config)


def _decode(data: bytes, name: str) -> str:
    if b"\x00" in data:
        raise UserError(f"{name} is a binary file (it holds zero bytes), no text.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        pass
    text = data.decode("latin-1")
    strange = sum((c < " " and c not in "\t\n\r\f") or "\x7f" <= c <= "\x9f" for c in text)
    if strange > 0.01 * len(text):
        raise UserError(f"{name} is a binary file (neither UTF-8 nor Latin-1), no text.")
    return text


def _documents(text: str, name: str, config: DataConfig) -> Iterator[str]:
    for number, line in enumerate(io.StringIO(text), start=1):
        if len(line) > config.max_line_chars:
            raise UserError(
                f"{name}: line {number} has {len(line):,} characters, more than data.max_line_chars {config.max_line_chars:,}: "
                "that is hardly text. Break it into lines, or raise the limit."
            )
    if config.document == "line":
        yield from text.splitlines()
    elif config.document == "paragraph":
        yield from re.split(r"\n\s*\n", text)
    else:
        yield text


def _huggingface(item: Item, config: DataConfig) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise UserError("data.source=huggingface needs the package datasets: pip install datasets.") from error
    try:
        stream = datasets.load_dataset(item.path, config.dataset_config, split=config.dataset_split, streaming=True)
    except Exception as error:  # it raises whatever its hub client does
        raise UserError(f"The data set {item.path} cannot be opened: {error}.") from error
    for record in islice(stream.skip(item.start), item.stop - item.start):
        if config.dataset_column not in record:
            columns = ", ".join(record)
            raise UserError(f"The data set {item.path} has no column {config.dataset_column}; it has {columns}.")
        yield str(record[config.dataset_column])


__all__ = ["Item", "archive_members", "items_of", "normalise", "read_item", "read_text", "source_version"]
