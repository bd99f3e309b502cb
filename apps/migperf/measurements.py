"""Tables of measurements: read from CSV into rows of the predictor, three published layouts, one sentence for what is wrong.

migprofiler   source, gpu, mode, workload, batch, seq, profile, latency_ms, latency_std_ms, gract, fb_mib, oom [, processes]
parvagpu      source, gpu, mode, workload, batch, processes, profile, latency_ms, throughput_per_s, oom
miso          source, gpu, mode, workload, batch, profile, step_s_median, step_s_p95, steps
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.mig.prediction import Measurement, PredictionError, parse_slice
from apps.program.errors import UserError

REQUIRED = ("gpu", "mode", "workload", "batch", "profile", "latency_ms")
MODES = {"infer": "infer", "inference": "infer", "train": "train", "training": "train"}
_P95_SIGMAS = 1.645


class MeasurementError(UserError):
    """A table that cannot be used; the sentence names the file, the line and what is wanted there."""


@dataclass(frozen=True)
class Table:
    """A table as it was read: its columns and cells, the rows made of them, and which rows ask for a prediction."""

    columns: tuple[str, ...]
    cells: tuple[Mapping[str, str], ...]
    rows: tuple[Measurement, ...]
    asked: tuple[bool, ...]
    """Rows whose latency is ``?``."""


def read_table(path: Path) -> Table:
    """Reads any of the three layouts.

    Raises:
        MeasurementError: no file, no rows, a column or a value that is missing or wrong.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = tuple((name or "").strip() for name in reader.fieldnames or ())
            reader.fieldnames = list(columns)
            lines = [(reader.line_num, line) for line in reader]
    except FileNotFoundError as error:
        raise MeasurementError(f"The measurements {path} do not exist.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MeasurementError(f"The measurements {path} cannot be read: {error}.") from error
    if not columns:
        raise MeasurementError(f"The measurements {path} are empty: a line with the column names must come first.")
    latency = "latency_ms" if "latency_ms" in columns or "step_s_median" not in columns else "step_s_median"
    missing = [name for name in (*REQUIRED[:-1], latency) if name not in columns]
    if missing:
        raise MeasurementError(
            f"{path} has no column {', '.join(missing)}: wanted are {', '.join(REQUIRED)} and, where known, "
            "seq, processes, latency_std_ms, gract, fb_mib, oom."
        )
    if not lines:
        raise MeasurementError(f"The measurements {path} hold column names but no rows.")
    cells, rows, asked = [], [], []
    for number, line in lines:
        if None in line or any(value is None for value in line.values()):
            raise MeasurementError(f"{path}, line {number}: it has not {len(columns)} cells, as the first line has.")
        cell = {name: value.strip() for name, value in line.items()}
        question = cell[latency] == "?"
        try:
            row = _row(cell, question)
            row.check()
            parse_slice(row.gpu, row.profile)
        except (ValueError, PredictionError) as error:
            raise MeasurementError(f"{path}, line {number}: {error}") from error
        cells.append(cell)
        rows.append(row)
        asked.append(question)
    return Table(columns, tuple(cells), tuple(rows), tuple(asked))


def write_table(path: Path, columns: Sequence[str], cells: Sequence[Mapping[str, str]]) -> None:
    """Writes rows as CSV.

    Raises:
        MeasurementError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(cells)
    except OSError as error:
        raise MeasurementError(f"{path} cannot be written: {error.strerror}.") from error


def _row(cell: Mapping[str, str], question: bool) -> Measurement:
    """One row of any layout. Raises ValueError with a sentence."""
    mode = MODES.get(cell["mode"].lower())
    if mode is None:
        raise ValueError(f"mode must be infer or train, not {cell['mode']!r}.")
    if not cell["workload"]:
        raise ValueError("workload is empty.")
    out = _flag(cell.get("oom", ""))
    latency, spread = None, _number(cell, "latency_std_ms")
    if not question:
        if "latency_ms" in cell:
            latency = _number(cell, "latency_ms")
        else:
            latency = _scaled(_number(cell, "step_s_median"))
            high = _scaled(_number(cell, "step_s_p95"))
            spread = None if latency is None or high is None else max(high - latency, 0) / _P95_SIGMAS
    if out:
        latency = None  # MIGPerf writes zeros there
    return Measurement(
        gpu=cell["gpu"],
        mode=mode,
        workload=cell["workload"],
        profile=cell["profile"],
        batch=_count(cell, "batch", None),
        sequence=_count(cell, "seq", 0) or None,
        processes=_count(cell, "processes", 1),
        latency_ms=latency,
        latency_std_ms=None if question else spread,
        gract=None if question else _number(cell, "gract"),
        fb_mib=None if question else _number(cell, "fb_mib"),
        oom=None if question else out,
    )


def _number(cell: Mapping[str, str], name: str) -> float | None:
    text = cell.get(name, "")
    if text in ("", "?"):
        return None
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} must be a number, not {text!r}.") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number that is not negative, not {text!r}.")
    return value


def _scaled(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _count(cell: Mapping[str, str], name: str, default: int | None) -> int:
    text = cell.get(name, "")
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value.is_integer() or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {text!r}.")
    return int(value)


def _flag(text: str) -> bool | None:
    known = {"": None, "?": None, "0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
    if text.lower() not in known:
        raise ValueError(f"oom must be 0 or 1, not {text!r}.")
    return known[text.lower()]
