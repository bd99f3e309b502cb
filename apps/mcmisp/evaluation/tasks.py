"""Readers of the fine-tuning tasks: SST-2 (tab-separated files) and RTE (the PASCAL challenges' XML)."""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from apps.mcmisp.data.sources import archive_members, read_text
from apps.program.errors import UserError


@dataclass(frozen=True)
class Example:
    """One text or a pair of them, and its label from 0."""

    first: str
    second: str | None
    label: int


@dataclass(frozen=True)
class TextTask:
    name: str
    train: list[Example]
    test: list[Example]
    labels: int = 2


def read_sst2(path: str | Path) -> TextTask:
    """A folder with ``train.tsv`` and ``test.tsv`` (or dev.tsv): one column of text and one of 0 or 1, with or without a header.

    Raises:
        UserError: a file is missing or otherwise.
    """
    folder = Path(path).expanduser()
    test = next((folder / name for name in ("test.tsv", "dev.tsv") if (folder / name).is_file()), folder / "test.tsv")
    return TextTask("sst2", _tsv(folder / "train.tsv"), _tsv(test))


def read_rte(path: str | Path) -> TextTask:
    """RTE 1 to 3 as XML in a folder or tar archive: files with "dev" in their names are for training, with "test" for testing.

    Raises:
        UserError: nothing there, or no RTE.
    """
    source = Path(path).expanduser()
    if source.is_dir():
        files = [(file.name, read_text(file)) for file in sorted(source.rglob("*.xml"))]
    elif source.is_file():
        files = sorted(archive_members(source, (".xml",)))
    else:
        raise UserError(f"There is no RTE at {source}.")
    parts: dict[str, list[Example]] = {"dev": [], "test": []}
    for name, text in files:
        part = "test" if "test" in Path(name).name.lower() else "dev"
        parts[part] += _rte(text, f"{source}:{name}")
    if not parts["dev"] or not parts["test"]:
        raise UserError(f"{source} lacks RTE's development or test pairs (files *dev*.xml, *test*.xml).")
    return TextTask("rte", parts["dev"], parts["test"])


def _tsv(path: Path) -> list[Example]:
    if not path.is_file():
        raise UserError(f"There is no {path}.")
    examples: list[Example] = []
    for number, row in enumerate(
        csv.reader(io.StringIO(read_text(path)), delimiter="\t", quoting=csv.QUOTE_NONE), start=1
    ):
        label = next((i for i in (-1, 0) if len(row) >= 2 and row[i].strip() in ("0", "1")), None)
        if label is not None:
            examples.append(Example(row[0] if label == -1 else row[1], None, int(row[label])))
        elif number > 1 and row:
            raise UserError(f"{path}: line {number} has no label 0 or 1.")
    if not examples:
        raise UserError(f"{path} holds no examples.")
    return examples


def _rte(text: str, name: str) -> list[Example]:
    try:
        root = ElementTree.fromstring(text.encode() if not text.startswith("<?xml") else text.split("?>", 1)[1].strip())
    except ElementTree.ParseError as error:
        raise UserError(f"{name} is no XML: {error}.") from error
    examples = []
    for pair in root.iter("pair"):
        # RTE 1 and 2 say TRUE/FALSE and YES/NO in "value" or "entailment".
        answer = (pair.get("value") or pair.get("entailment") or "").upper()
        first, second = pair.findtext("t"), pair.findtext("h")
        if answer not in ("TRUE", "FALSE", "YES", "NO") or first is None or second is None:
            raise UserError(f"{name}: a pair lacks its text, hypothesis or answer.")
        examples.append(Example(first.strip(), second.strip(), int(answer in ("TRUE", "YES"))))
    return examples


__all__ = ["Example", "TextTask", "read_rte", "read_sst2"]
