"""Pre-tokenised rows on disk: Parquet files with fixed-size rows, a manifest, reading by row number with a small cache."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from apps.mcmisp.data.tokenizer import TextTokenizer
from apps.program.errors import UserError

FORMAT = 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"


@dataclass(frozen=True)
class Manifest:
    """What a prepared corpus holds. ``rows_by_file``: of the training files in their order."""

    format: int
    fingerprint: str
    tokenizer: str
    vocab_size: int
    row_tokens: int
    group_rows: int
    rows_by_file: list[int]
    validation_rows: int
    documents: int
    duplicates: int
    tokens: int
    padding: int
    words: int

    @property
    def rows(self) -> int:
        return sum(self.rows_by_file)

    @property
    def padding_fraction(self) -> float:
        return self.padding / max(1, (self.rows + self.validation_rows) * self.row_tokens)


class RowWriter:
    """Writes rows to ``<prefix>-NNNNN.parquet``, ``group_rows`` in a row group and ``groups`` of them in a file."""

    def __init__(self, folder: Path, prefix: str, size: int, group_rows: int, groups: int = 16):
        self._folder, self._prefix, self._size = folder, prefix, size
        self._group_rows, self._groups = group_rows, groups
        self._schema = pa.schema([("row", pa.int64()), ("ids", pa.binary(4 * size)), ("document", pa.binary(2 * size))])
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._writer: pq.ParquetWriter | None = None
        self.rows_by_file: list[int] = []

    def add(self, ids: np.ndarray, document: np.ndarray) -> None:
        self._waiting.append((ids, document))
        if len(self._waiting) == self._group_rows:
            self._write_group()

    def close(self) -> None:
        if self._waiting:
            self._write_group()
        if self._writer is not None:
            self._writer.close()

    def _write_group(self) -> None:
        if self._writer is None or self.rows_by_file[-1] >= self._group_rows * self._groups:
            if self._writer is not None:
                self._writer.close()
            path = self._folder / f"{self._prefix}-{len(self.rows_by_file):05d}.parquet"
            self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
            self.rows_by_file.append(0)
        first = sum(self.rows_by_file)
        columns = [
            pa.array(range(first, first + len(self._waiting)), pa.int64()),
            _binary(np.stack([ids for ids, _ in self._waiting]).astype("<i4"), 4 * self._size),
            _binary(np.stack([document for _, document in self._waiting]).astype("<u2"), 2 * self._size),
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema), row_group_size=self._group_rows)
        self.rows_by_file[-1] += len(self._waiting)
        self._waiting = []


def columns_to_rows(table: pa.Table, size: int) -> tuple[np.ndarray, np.ndarray]:
    """ids int32 [rows, size] and document uint16 [rows, size] of a Parquet (or Ray Data) table."""
    return _rows(table.column("ids"), "<i4", size), _rows(table.column("document"), "<u2", size)


class PackedRows:
    """Rows of a prepared corpus by number; picklable, so that any worker can read them where the folder is seen."""

    def __init__(self, folder: Path, part: str = "train"):
        self.folder, self.part, self.manifest = folder, part, read_manifest(folder)
        self.files = sorted(folder.glob(f"{part}-*.parquet"))
        self._count = self.manifest.rows if part == "train" else self.manifest.validation_rows

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows ``start`` to ``stop`` - 1."""
        group = self.manifest.group_rows
        parts = []
        for number in range(start // group, -(-stop // group)):
            ids, document = _group(str(self.folder), self.part, number, self.manifest.row_tokens)
            place = slice(max(0, start - number * group), stop - number * group)
            parts.append((ids[place], document[place]))
        if not parts:
            empty = np.zeros((0, self.manifest.row_tokens), np.int32)
            return empty, empty.astype(np.uint16)
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def tokenizer(self) -> TextTokenizer:
        return TextTokenizer.load(self.folder / TOKENIZER)


@lru_cache(maxsize=4)
def _group(folder: str, part: str, number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A row group by its number over all files (every file but the last has the same number of groups)."""
    for path in sorted(Path(folder).glob(f"{part}-*.parquet")):
        file = pq.ParquetFile(path)
        if number < file.num_row_groups:
            return columns_to_rows(file.read_row_group(number, columns=["ids", "document"]), size)
        number -= file.num_row_groups
    raise UserError(f"{folder} lacks rows that its manifest names: prepare it anew.")


def read_manifest(folder: Path) -> Manifest:
    """
    Raises:
        UserError: no prepared corpus, or of another format.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
        if content.get("format") != FORMAT:
            raise UserError(f"{folder} was prepared in format {content.get('format')}, this program reads {FORMAT}.")
        return Manifest(**content)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is no prepared corpus: its {MANIFEST} cannot be read.") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n")


def _binary(matrix: np.ndarray, width: int) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(matrix).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(matrix), [None, data])


def _rows(column: pa.ChunkedArray, kind: str, size: int) -> np.ndarray:
    parts = []
    for chunk in column.chunks:
        width = chunk.type.byte_width
        data = np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * width : (chunk.offset + len(chunk)) * width]
        parts.append(data.view(kind).reshape(len(chunk), size))
    return np.concatenate(parts) if parts else np.zeros((0, size), kind)


__all__ = ["Manifest", "PackedRows", "RowWriter", "columns_to_rows", "read_manifest", "write_manifest"]
