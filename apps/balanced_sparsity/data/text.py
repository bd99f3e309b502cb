"""Word-level text for language models: the standard library's docstrings (embedded), WikiText-2, or any text files.

Words and punctuation marks are tokens, a line's end is ``<eos>``; the ``vocabulary`` most frequent ones of the training part keep
their names, the others are ``<unk>``, as Zaremba's and Mikolov's PTB has it.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from apps.balanced_sparsity.data.files import read_files
from apps.program.errors import UserError

UNKNOWN, LINE_END = "<unk>", "<eos>"
TEXT_HOW = (
    "Name a text file, a folder or an archive of text files in data.train (and one in data.test, or a part of the training text "
    "is held out); WikiText-2 is had from https://huggingface.co/datasets/Salesforce/wikitext."
)
_TOKEN = re.compile(r"<unk>|<eos>|@\S@|\w+(?:['’]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class TextData:
    """Token numbers int64 [N] of what is trained on and of what is only evaluated; ``words``: names by number."""

    train: torch.Tensor
    test: torch.Tensor
    words: tuple[str, ...]


def tokens_of(text: str) -> list[str]:
    """Lower-case words and marks; ``<eos>`` for each end of a line that is not empty."""
    tokens: list[str] = []
    for line in text.lower().splitlines():
        found = _TOKEN.findall(line)
        if found:
            tokens += [*found, LINE_END]
    return tokens


@lru_cache(maxsize=1)
def docstrings() -> str:
    """Docstrings of the standard library's modules, classes and functions, file by file in name order: some 100,000 words."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # not every file there is Python of this version
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                told = ast.get_docstring(node)
                if told:
                    texts.append(inspect.cleandoc(told))
    return "\n".join(texts)


def embedded(vocabulary: int, held_out: float = 0.1, limit: int | None = None) -> TextData:
    """The docstrings; the last part of them is held out. Nothing to download."""
    return _split(tokens_of(docstrings())[:limit], vocabulary, held_out)


def text_files(
    train: str, test: str | None, vocabulary: int, held_out: float = 0.1, limit: int | None = None
) -> TextData:
    """Text from files, folders or archives.

    Args:
        test: None: each training file's last ``held_out`` part is evaluated instead.
        limit: tokens that are trained on at most.

    Raises:
        UserError: nothing there, or too little of it.
    """
    files = _read(train)
    if test is not None:
        return _number(_joined(files)[:limit], _joined(_read(test)), vocabulary)
    first: list[str] = []
    last: list[str] = []
    for text in files:
        tokens = tokens_of(text)
        cut = len(tokens) - int(len(tokens) * held_out)
        first += tokens[:cut]
        last += tokens[cut:]
    return _number(first[:limit], last, vocabulary)


def _read(path: str) -> list[str]:
    if Path(path).expanduser().is_file() and not path.endswith((".tar", ".gz", ".xz", ".tgz")):
        try:
            return [Path(path).expanduser().read_text(encoding="utf-8", errors="replace")]
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    found = read_files(path, (".txt", ".tokens", ".text"), TEXT_HOW)
    return [data.decode("utf-8", errors="replace") for _, data in found]


def _joined(files: Iterable[str]) -> list[str]:
    return [token for text in files for token in tokens_of(text)]


def _split(tokens: list[str], vocabulary: int, held_out: float) -> TextData:
    cut = len(tokens) - int(len(tokens) * held_out)
    return _number(tokens[:cut], tokens[cut:], vocabulary)


def _number(train: list[str], test: list[str], vocabulary: int) -> TextData:
    if len(train) < 100 or len(test) < 20:
        raise UserError(
            f"The text has {len(train)} tokens to train on and {len(test)} to evaluate: too few. {TEXT_HOW}"
        )
    counts = Counter(train)
    counts.pop(UNKNOWN, None)
    # Equally frequent words by name, so that the numbers do not depend on the order of reading.
    words = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: vocabulary - 1]]
    names = (UNKNOWN, *words)
    numbers = {name: number for number, name in enumerate(names)}
    parts = [torch.tensor([numbers.get(token, 0) for token in part], dtype=torch.int64) for part in (train, test)]
    return TextData(parts[0], parts[1], names)
