"""Sources: prose out of docstrings, text out of folders; what is no text is refused with its name."""

from __future__ import annotations

import io
import sys
import tarfile
import types

import pytest
from pydantic import ValidationError

from apps.mcmisp.data.config import DataConfig
from apps.mcmisp.data.docstrings import docstrings, package_files, prose_of
from apps.mcmisp.data.sources import items_of, normalise, read_item
from apps.program.errors import UserError


def folder_config(path, **options) -> DataConfig:
    return DataConfig(source="folder", folder=str(path), min_words=2, **options)


def texts(config: DataConfig) -> list[str]:
    return [text for item in items_of(config) for text in read_item(item, config)]


def test_prose_of_a_docstring_leaves_out_code_and_rules():
    text = """Return the sum of all elements over ``axis``.

    Parameters
    ----------
    x : int

    The result has the type of :class:`numpy.ndarray` in every case.

    >>> total([1, 2])
    3
    """
    assert prose_of(text) == (
        "Return the sum of all elements over axis.\nThe result has the type of numpy.ndarray in every case."
    )


def test_docstrings_of_a_file_come_in_order_and_a_broken_file_gives_none(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        '"""A module that says what it is for."""\ndef f():\n    """A function that returns nothing at all."""\n'
    )
    assert list(docstrings(str(path))) == [
        "A module that says what it is for.",
        "A function that returns nothing at all.",
    ]
    path.write_text("def (:")
    assert list(docstrings(str(path))) == []


def test_installed_packages_have_files_and_absent_ones_none():
    names = [name for name, _ in package_files(["jinja2", "no_such_package"], False)]
    assert names and all(name.startswith("jinja2/") for name in names)
    with pytest.raises(UserError, match=r"None of data.packages is installed"):
        items_of(DataConfig(packages=["no_such_package"], standard_library=False))


def test_a_folder_is_read_with_archives_in_a_fixed_order(tmp_path):
    (tmp_path / "b.txt").write_text("second   file\nof text")
    (tmp_path / "a.md").write_text("first file of text\n\nwith two paragraphs here")
    with tarfile.open(tmp_path / "c.tar.xz", "w:xz") as archive:
        data = "third text café".encode("latin-1")
        info = tarfile.TarInfo("in/it.txt")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    assert texts(folder_config(tmp_path)) == [
        "first file of text with two paragraphs here", "second file of text", "third text café",
    ]  # fmt: skip
    assert len(texts(folder_config(tmp_path, document="paragraph"))) == 4


def test_normalise():
    assert normalise("A\u00adb\t e\u0301\u200b\n c") == "A b é c"
    assert normalise("ABC", lowercase=True) == "abc"


@pytest.mark.parametrize("data", [b"abc\x00def and more", bytes(range(128, 160)) * 9])
def test_a_binary_file_is_refused_by_name(tmp_path, data):
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(UserError, match=r"x.txt is a binary file"):
        texts(folder_config(tmp_path))


def test_one_enormous_line_is_refused_with_its_number(tmp_path):
    (tmp_path / "x.txt").write_text("short line\n" + "word " * 100)
    with pytest.raises(UserError, match=r"x.txt: line 2 has 500 characters, more than data.max_line_chars 100"):
        texts(folder_config(tmp_path, max_line_chars=100))


def test_folders_without_text_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no text"):
        items_of(folder_config(tmp_path))
    with pytest.raises(UserError, match="is no folder"):
        items_of(folder_config(tmp_path / "none"))
    (tmp_path / "broken.tar").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no archive that can be read"):
        texts(folder_config(tmp_path))


def test_a_source_must_be_named():
    with pytest.raises(ValidationError, match=r"source=folder needs data.folder"):
        DataConfig(source="folder")


def test_a_hugging_face_data_set_is_streamed_in_stretches(monkeypatch):
    config = DataConfig(source="huggingface", dataset="some/set", max_documents=2500, min_words=2)
    items = items_of(config)
    assert [(item.start, item.stop) for item in items] == [(0, 1000), (1000, 2000), (2000, 2500)]

    class Stream:
        def __init__(self, first=0):
            self.first = first

        def skip(self, count):
            return Stream(self.first + count)

        def __iter__(self):
            return ({"text": f"record number {i}"} for i in range(self.first, 10_000))

    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, config, split, streaming: Stream()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    got = list(read_item(items[2], config))
    assert got[0] == "record number 2000" and got[-1] == "record number 2499"
    with pytest.raises(UserError, match="no column body; it has text"):
        list(read_item(items[0], config.model_copy(update={"dataset_column": "body"})))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        list(read_item(items[0], config))
