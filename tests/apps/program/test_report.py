"""The report: one file that loads nothing from elsewhere, escaped, with readable cells."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from apps.program.report import Report, format_value, new_figure, png_bytes, print_table
from apps.program.run_folder import RunFolder


class Checker(HTMLParser):
    """Collects tags that are open and everything that a browser would load."""

    VOID = ("meta", "img", "br", "link", "hr", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def example() -> Report:
    report = Report("A <title>", summary="made & tested")
    report.add_text("Words", "One.\n\nTwo <b>.")
    report.add_table("Numbers", ["name", "value"], [["a", 1234567], ["b", None]], caption="all of them")
    figure, axes = new_figure(4, 2)
    axes.plot([0, 1], [1, 0])
    report.add_figure("A picture", figure, caption="falling")
    report.add_figure("A picture", figure)
    report.add_code("Command", "make demo && echo <done>")
    return report


def test_the_file_is_whole_and_alone(run_folder: RunFolder) -> None:
    path = Path(example().write(run_folder))
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    assert checker.open == []
    assert all(re.match(r"(data:image/png;base64,|#)", target) for target in checker.loads)
    text = "".join(checker.text)
    for part in ("A <title>", "made & tested", "Two <b>.", "1,234,567", "–", "all of them", "make demo && echo <done>"):
        assert part in text
    assert "http" not in path.read_text(encoding="utf-8").replace("http-equiv", "")


def test_pictures_stand_beside_it_and_in_it(run_folder: RunFolder) -> None:
    html = Path(example().write(run_folder)).read_text(encoding="utf-8")
    assert (run_folder / "a_picture.png").is_file()
    assert (run_folder / "a_picture_2.png").is_file(), "pictures of one heading do not overwrite one another"
    inlined = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", html)
    assert base64.b64decode(inlined[0]) == (run_folder / "a_picture.png").read_bytes()


def test_a_picture_shows_what_was_drawn() -> None:
    figure, axes = new_figure(4, 2)
    empty = matplotlib.image.imread(io.BytesIO(png_bytes(figure)))
    axes.fill_between([0, 1], [1, 1])
    drawn = matplotlib.image.imread(io.BytesIO(png_bytes(figure)))
    assert empty.shape == drawn.shape
    assert np.abs(empty - drawn).max(axis=-1).mean() > 0.05


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="has 1 cells for 2 columns"):
        Report("r").add_table("t", ["a", "b"], [[1]])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (0.123456, "0.123"),
        (1234.56, "1,235"),
        (0.0, "0"),
        (1.2e-5, "1.20e-05"),
        (None, "–"),
        (float("nan"), "–"),
        (float("-inf"), "-∞"),
        (True, "yes"),
        ("text", "text"),
    ],
)
def test_format_value(value: object, text: str) -> None:
    assert format_value(value) == text  # type: ignore[arg-type]


def test_a_table_on_the_terminal() -> None:
    stream = io.StringIO()
    print_table(["name", "ms"], [["a", 1.5], ["bb", 1200.0]], "Latency", Console(file=stream, width=60))
    printed = stream.getvalue()
    assert "Latency" in printed
    assert re.search(r"bb\s.*1,200", printed)
