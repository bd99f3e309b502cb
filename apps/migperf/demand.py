"""The planner's two tables, read from CSV: what was measured on slices (P), and what is demanded (D).

    P   gpu, workload, profile, batch, latency_ms, throughput_per_s [, mode, processes, oom, ...]    (ParvaGPU's layout)
    D   workload, requests_per_s, latency_limit_ms [, mode]

``throughput_per_s`` of P is that of *one process*: ParvaGPU measured each process by itself (it is batch / latency for any
number of processes), so a slice with three processes serves three times as much. Rows that ran out of memory (oom = 1) have
no numbers and serve nothing.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from actors.mig.geometry import GeometryError, GpuGeometry, gpu_geometry
from actors.mig.planner import Demand, Measurement, PlannerError
from apps.program.errors import UserError

PROFILE_COLUMNS = ("gpu", "workload", "profile", "batch", "latency_ms", "throughput_per_s")
DEMAND_COLUMNS = ("workload", "requests_per_s", "latency_limit_ms")
WHOLE_GPU = ("full", "nomig", "no-mig", "none")
MODES = {"": "infer", "infer": "infer", "inference": "infer", "train": "train", "training": "train"}


class TableError(UserError):
    """A table that cannot be used; the sentence names the file, the line and what is wanted there."""


def read_profiles(path: Path) -> tuple[list[Measurement], dict[str, GpuGeometry]]:
    """Measurements that ran, and the geometry of every GPU among them. Rows of a whole GPU (MIG off) are no slices and left
    out.

    Raises:
        TableError: no file, a column or value that is missing or wrong, a GPU or profile that does not exist.
    """
    rows: list[Measurement] = []
    geometries: dict[str, GpuGeometry] = {}
    for where, cell in _lines(path, "profiles", PROFILE_COLUMNS):
        profile = cell["profile"]
        if profile.lower() in WHOLE_GPU:
            continue
        try:
            geometry = geometries.setdefault(cell["gpu"], gpu_geometry(cell["gpu"]))
            profile = geometry.profile(profile).name
        except GeometryError as error:
            raise TableError(f"{where}: {error}") from error
        if _out_of_memory(where, cell.get("oom", "")):
            continue
        processes = _whole(where, "processes", cell.get("processes") or "1")
        throughput = _number(where, "throughput_per_s", cell["throughput_per_s"])
        latency = _number(where, "latency_ms", cell["latency_ms"])
        if not (math.isfinite(latency) and latency > 0 and math.isfinite(throughput) and throughput > 0):
            raise TableError(
                f"{where}: latency_ms and throughput_per_s must be positive numbers (a row that ran out of memory has oom = 1)."
            )
        rows.append(
            Measurement(
                workload=cell["workload"],
                gpu=cell["gpu"],
                profile=profile,
                batch=_whole(where, "batch", cell["batch"]),
                processes=processes,
                latency_ms=latency,
                throughput_per_s=throughput * processes,
                mode=_mode(where, cell.get("mode", "")),
            )
        )
    if not rows:
        raise TableError(f"The profiles {path} have no row of a slice that ran.")
    return rows, geometries


def read_demand(path: Path) -> list[Demand]:
    """The demands, in the order of the file.

    Raises:
        TableError: no file, a column or value that is missing or wrong.
    """
    demands = []
    for where, cell in _lines(path, "demands", DEMAND_COLUMNS):
        mode = _mode(where, cell.get("mode", ""))
        limit = cell["latency_limit_ms"]
        if not cell["workload"]:
            raise TableError(f"{where}: workload is empty.")
        if limit == "" and mode == "infer":
            raise TableError(f"{where}: {cell['workload']} needs a latency_limit_ms.")
        try:
            demands.append(
                Demand(
                    workload=cell["workload"],
                    requests_per_s=_number(where, "requests_per_s", cell["requests_per_s"]),
                    latency_limit_ms=math.inf if limit == "" else _number(where, "latency_limit_ms", limit),
                    mode=mode,
                )
            )
        except PlannerError as error:
            raise TableError(f"{where}: {error}") from error
    return demands


def _lines(path: Path, what: str, required: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """(where, cells) of every row."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            names = [(name or "").strip() for name in reader.fieldnames or ()]
            reader.fieldnames = names
            lines = [(reader.line_num, line) for line in reader]
    except FileNotFoundError as error:
        raise TableError(f"The {what} {path} do not exist.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TableError(f"The {what} {path} cannot be read: {error}.") from error
    if not names:
        raise TableError(f"The {what} {path} are empty: wanted are the columns {', '.join(required)}.")
    missing = [name for name in required if name not in names]
    if missing:
        plural = "s" if len(missing) > 1 else ""
        raise TableError(
            f"{path} has no column{plural} {', '.join(missing)}: wanted are {', '.join(required)}; it has {', '.join(names)}."
        )
    if not lines:
        raise TableError(f"The {what} {path} hold column names but no rows.")
    for number, line in lines:
        where = f"{path}, line {number}"
        if None in line or any(value is None for value in line.values()):
            raise TableError(f"{where}: it has not {len(names)} cells, as the first line has.")
        yield where, {name: value.strip() for name, value in line.items()}


def _number(where: str, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise TableError(f"{where}: {name} must be a number, not {text!r}.") from None


def _whole(where: str, name: str, text: str) -> int:
    value = _number(where, name, text)
    if not value.is_integer() or value < 1:
        raise TableError(f"{where}: {name} must be a whole number of at least 1, not {text!r}.")
    return int(value)


def _mode(where: str, text: str) -> str:
    mode = MODES.get(text.lower())
    if mode is None:
        raise TableError(f"{where}: mode must be infer or train, not {text!r}.")
    return mode


def _out_of_memory(where: str, text: str) -> bool:
    known = {"": False, "0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
    if text.lower() not in known:
        raise TableError(f"{where}: oom must be 0 or 1, not {text!r}.")
    return known[text.lower()]
