"""The one report: text, tables and pictures in a single self-contained HTML file, the pictures beside it as PNG.

report = Report("Llumnix: replay", summary="200 requests on 4 instances")
report.add_table("Latency", ["", "TTFT P99 (ms)"], [["migration", 120.0], ["none", 480.0]])
report.add_figure("Load of each instance", figure, caption="...")
path = report.write(folder)
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
from rich.console import Console
from rich.table import Table

from apps.program.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PALETTE", "Report", "format_value", "new_figure", "png_bytes", "print_table"]

# Okabe and Ito's colours: told apart by colour-blind readers, and on light and dark ground.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D1F", "#7F7F7F")

Cell = str | float | int | bool | None


def new_figure(width_in: float = 8.0, height_in: float = 4.0, rows: int = 1, columns: int = 1, **kwargs: Any) -> Any:
    """(figure, axes) in the house's style, drawn without a display and outside pyplot (so nothing has to be closed).

    Args:
        width_in, height_in: inches.
        rows, columns, kwargs: as for ``Figure.subplots``.
    """
    import matplotlib
    from cycler import cycler
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "axes.prop_cycle": cycler(color=list(PALETTE)),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "font.size": 10,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, **kwargs)
    return figure, axes


def png_bytes(figure: Figure, dpi: int = 130) -> bytes:
    """The picture as PNG on white ground."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()


def format_value(value: Cell) -> str:
    """A cell's text: three significant digits for fractions, thousands with commas, a dash for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if math.isinf(value):
            return "∞" if value > 0 else "-∞"
        if value == 0 or abs(value) >= 100:
            return f"{value:,.0f}"
        return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.2e}"
    return value


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[Cell]], title: str | None = None, console: Console | None = None
) -> None:
    """Prints a table to the terminal; columns whose cells are all numbers are set flush right."""
    table = Table(title=title, title_justify="left", header_style="bold")
    numeric = _numeric_columns(columns, rows)
    for name, is_number in zip(columns, numeric, strict=True):
        table.add_column(name, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*(format_value(cell) for cell in row))
    (console or Console()).print(table)


class Report:
    """Collects sections in order; ``write`` makes ``report.html`` and one PNG for each figure."""

    def __init__(self, title: str, summary: str = ""):
        self.title = title
        self.summary = summary
        self._sections: list[dict[str, Any]] = []

    def add_text(self, heading: str, text: str) -> None:
        """Plain text; a blank line begins a new paragraph."""
        paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
        self._sections.append({"kind": "text", "heading": heading, "paragraphs": paragraphs})

    def add_code(self, heading: str, text: str) -> None:
        """Text kept as typed: a command, a configuration, a transcript."""
        self._sections.append({"kind": "code", "heading": heading, "text": text})

    def add_table(
        self, heading: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = ""
    ) -> None:
        """Cells are formatted by ``format_value``.

        Raises:
            ValueError: a row has another number of cells than there are columns.
        """
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"Table {heading!r}: a row has {len(row)} cells for {len(columns)} columns.")
        self._sections.append(
            {
                "kind": "table",
                "heading": heading,
                "columns": list(zip(columns, _numeric_columns(columns, rows), strict=True)),
                "rows": [[format_value(cell) for cell in row] for row in rows],
                "caption": caption,
            }
        )

    def add_figure(self, heading: str, figure: Figure, caption: str = "", name: str | None = None) -> None:
        """Keeps the picture as it is now. ``name`` (default: from the heading) names its PNG file."""
        stem = base = re.sub(r"[^a-z0-9]+", "_", (name or heading).lower()).strip("_") or "figure"
        taken = {section.get("name") for section in self._sections}
        number = 2
        while stem in taken:
            stem, number = f"{base}_{number}", number + 1
        self._sections.append(
            {"kind": "figure", "heading": heading, "caption": caption, "name": stem, "png": png_bytes(figure)}
        )

    def html(self) -> str:
        """The whole report in one file that loads nothing from elsewhere."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("apps.program"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters["data_uri"] = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"
        return environment.get_template("report.html").render(
            title=self.title,
            summary=self.summary,
            sections=self._sections,
            made_at=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        )

    def write(self, folder: RunFolder, name: str = "report.html") -> str:
        """Writes the report and its pictures into the run folder; returns the report's path.

        Raises:
            UserError: the folder cannot be written.
        """
        for section in self._sections:
            if section["kind"] == "figure":
                folder.write_bytes(f"{section['name']}.png", section["png"])
        return str(folder.write_text(name, self.html()))


def _numeric_columns(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[bool]:
    def numeric(cell: Cell) -> bool:
        return cell is None or (isinstance(cell, (int, float)) and not isinstance(cell, bool))

    return [bool(rows) and all(numeric(row[index]) for row in rows) for index in range(len(columns))]
