"""The embedded corpus: prose in the docstrings of installed packages, read with ``ast``, nothing is imported."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_CODE = re.compile(r"^\s*(>>>|\.\.\.|In \[|Out\[|\.\. |:[a-z]+[^:]*:|@|#|\$ |`{3}|\|.*\||[-=~^*+_\"'`#]{3,}\s*$)")
_PROSE = re.compile(r"[A-Za-z]{2,}")
_ROLE = re.compile(r":[\w:.+-]+:`~?\.?([^`<]*?)(?:\s*<[^>]*>)?`")
_TICKS = re.compile(r"`{1,2}([^`]+)`{1,2}_?")


def package_files(packages: list[str], standard_library: bool) -> list[tuple[str, str]]:
    """(name, path) of every Python file of the packages that are installed, in a fixed order."""
    found: list[tuple[str, str]] = []
    roots = [(name, root) for name in sorted(set(packages)) for root in _roots(name)]
    for name, root in roots:
        found += [(f"{name}/{path.relative_to(root)}", str(path)) for path in sorted(root.rglob("*.py"))]
    if standard_library:
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
        paths = [path for path in sorted(root.rglob("*.py")) if not skip & set(path.relative_to(root).parts)]
        found += [(f"python/{path.relative_to(root)}", str(path)) for path in paths]
    return found


def corpus_version(packages: list[str], standard_library: bool) -> list[str]:
    """What the corpus depends on: packages and their versions."""
    owners = importlib.metadata.packages_distributions()
    versions = [
        f"{name}=={importlib.metadata.version(owners[name][0]) if name in owners else '?'}"
        for name in sorted(set(packages)) if _roots(name)
    ]  # fmt: skip
    return versions + ([f"python=={sys.version.split()[0]}"] if standard_library else [])


def docstrings(path: str) -> Iterator[str]:
    """Prose of each docstring of a Python file, in its order; nothing for a file that is no Python of this version."""
    try:
        source = Path(path).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in others' files
            tree = ast.parse(source)
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text:
                prose = prose_of(inspect.cleandoc(text))
                if prose:
                    yield prose


def prose_of(docstring: str) -> str:
    """Paragraphs of running text: no examples of code, tables, rules and directives; mark-up stripped from words."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.splitlines()
        if any(line.lstrip().startswith(">>>") for line in lines):
            continue
        text = " ".join(line.strip() for line in lines if not _CODE.match(line))
        text = _TICKS.sub(r"\1", _ROLE.sub(r"\1", text))
        words = text.split()
        # Prose is mostly words; signatures, shapes and tables are not.
        if len(words) >= 4 and sum(bool(_PROSE.search(w)) for w in words) >= 0.7 * len(words):
            kept.append(text)
    return "\n".join(kept)


def _roots(name: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    return [Path(one) for one in spec.submodule_search_locations or []] if spec is not None else []


__all__ = ["corpus_version", "docstrings", "package_files", "prose_of"]
