"""What every benchmark shares: arguments, the machine and versions, fair A/B timing, the table and the JSON.

    TARGETS = [Target("decode_b1_fp32", must=1.2, goal=1.4, meaning="transformers / Sextant")]

    def main() -> int:
        bench = Benchmark("llumnix_engine", "Speed of the engine against transformers.", TARGETS)
        repeats = 5 if bench.quick else 20
        samples = alternate({"sextant": step, "transformers": other_step}, repeats)
        bench.figure("decode_b1_fp32", samples.ratio("transformers", "sextant").median)
        return bench.finish()

Needs the standard library alone (a GPU machine may have no Ray and no rich); pictures need matplotlib.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "ray", "numpy", "transformers", "triton", "deepspeed", "tokenizers", "gguf")
CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
             "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve", "sve2", "bf16", "i8mm")  # fmt: skip


@dataclass(frozen=True)
class Target:
    """What a figure must reach and what it should. ``better="lower"`` for durations, error counts and the like."""

    key: str
    must: float
    goal: float
    better: Literal["higher", "lower"] = "higher"
    meaning: str = ""

    def met(self, value: float | None) -> Literal["goal", "must", "no", "missing"]:
        if value is None or math.isnan(value):
            return "missing"
        sign = 1 if self.better == "higher" else -1
        if sign * value >= sign * self.goal:
            return "goal"
        return "must" if sign * value >= sign * self.must else "no"


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of ``count`` ratios, each of two neighbours in time."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Samples:
    """What ``alternate`` measured: for each arm its values, the i-th of each taken in the same round."""

    values: Mapping[str, tuple[float, ...]]

    def median(self, arm: str) -> float:
        return statistics.median(self.values[arm])

    def spread(self, arm: str) -> float:
        """Interquartile range over the median: how noisy the machine was."""
        low, middle, high = _quartiles(self.values[arm])
        return (high - low) / middle if middle else math.nan

    def ratio(self, numerator: str, denominator: str) -> Ratio:
        """Of the values round by round, so that a drift of the machine's speed cancels out."""
        pairs = zip(self.values[numerator], self.values[denominator], strict=True)
        ratios = [a / b if b else math.inf for a, b in pairs]
        low, middle, high = _quartiles(ratios)
        return Ratio(middle, low, high, len(ratios))


def alternate(
    arms: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    warmup: int = 1,
    calls: int = 1,
    returns_value: bool = False,
) -> Samples:
    """Measures the arms in turn, the order reversed in every other round (A B, B A, ...).

    Args:
        arms: what to call. On a GPU the callable must wait for the device itself.
        repeats: rounds, after ``warmup`` rounds that are thrown away.
        calls: calls per measurement, for arms much shorter than a millisecond; the value is per call.
        returns_value: the arm returns its own measurement (of any unit); else seconds of wall time are taken.
    """
    if repeats < 1 or calls < 1:
        raise ValueError(f"repeats and calls must be at least 1, not {repeats} and {calls}.")
    values: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(warmup + repeats):
        order = list(arms) if number % 2 == 0 else list(arms)[::-1]
        for name in order:
            began = time.perf_counter()
            results = [arms[name]() for _ in range(calls)]
            elapsed = time.perf_counter() - began
            if number >= warmup:
                values[name].append(sum(results) / calls if returns_value else elapsed / calls)
    return Samples({name: tuple(of_arm) for name, of_arm in values.items()})


class Benchmark:
    """One run of one benchmark: reads the command line, collects figures and rows, prints and writes them."""

    def __init__(
        self,
        name: str,
        description: str,
        targets: Sequence[Target],
        arguments: Sequence[str] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        """``arguments``: the command line without the program's name; sys.argv's by default.

        ``options``: further options, each a flag and the keywords of argparse's ``add_argument``; found in ``arguments``.
        """
        self.name = name
        self.targets = tuple(targets)
        self.figures: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []
        self.pictures: list[Path] = []
        self._began = time.monotonic()
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
        parser.add_argument("--quick", action="store_true", help="the reduced form: 2 minutes on 2 cores")
        parser.add_argument(
            "--out", type=Path, default=Path("runs") / "benchmarks", metavar="DIR", help="where the JSON goes"
        )
        parser.add_argument("--strict", action="store_true", help="exit with 1 when a figure misses what it must reach")
        for flag, keywords in (options or {}).items():
            parser.add_argument(flag, **keywords)
        self.arguments = parser.parse_args(arguments)
        self.quick: bool = self.arguments.quick
        self.out: Path = self.arguments.out
        self._command = [f"python -m benchmarks.{name}", *(sys.argv[1:] if arguments is None else arguments)]
        if arguments is None:  # ended by a signal, a benchmark takes its clusters and processes with it
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out {self.out} cannot be made: {error.strerror}")

    def say(self, text: str) -> None:
        """Progress on stderr, with the seconds since the start; stdout keeps the result."""
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", file=sys.stderr, flush=True)

    def figure(self, key: str, value: float) -> None:
        """A number under its key.

        Raises:
            ValueError: the key was given before.
        """
        if key in self.figures:
            raise ValueError(f"The figure {key!r} was given twice.")
        self.figures[key] = float(value)

    def row(self, **cells: Any) -> None:
        """A line of the details that the figures were made from."""
        self.rows.append(cells)

    def picture(self, figure: Any, name: str | None = None) -> Path:
        """Writes a matplotlib figure to ``DIR/<benchmark>[_<name>].png``."""
        path = self.out / f"{self.name}{f'_{name}' if name else ''}.png"
        figure.savefig(path, dpi=130, facecolor="white")
        self.pictures.append(path)
        return path

    def result(self) -> dict[str, Any]:
        """What the JSON holds."""
        return {
            "benchmark": self.name,
            "machine": machine(),
            "versions": versions(),
            "run": {
                "command": " ".join([self._command[0], *map(shlex.quote, self._command[1:])]),
                "quick": self.quick,
                "commit": commit(),
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - self._began, 1),
            },
            "figures": _json_numbers(self.figures),
            "targets": {t.key: {"must": t.must, "goal": t.goal, "better": t.better} for t in self.targets},
            "rows": _json_numbers(self.rows),
        }

    def finish(self) -> int:
        """Prints the table, writes ``DIR/<name>.json``, returns the exit code (1: ``--strict`` and a must was missed)."""
        result = self.result()
        print_figures(self.name, self.targets, self.figures)
        path = self.out / f"{self.name}.json"
        _write_whole(path, json.dumps(result, indent=1, default=str) + "\n")
        for written in (path, *self.pictures):
            print(f"wrote {written}")
        missed = [t.key for t in self.targets if t.met(self.figures.get(t.key)) in ("no", "missing")]
        return 1 if missed and self.arguments.strict else 0


def print_figures(title: str, targets: Sequence[Target], figures: Mapping[str, float]) -> None:
    """The table: key, must, goal, value, met; figures without a target stand below."""
    rows = []
    for target in targets:
        value = figures.get(target.key)
        sign = ">=" if target.better == "higher" else "<="
        shown = "-" if value is None else _number(value)
        met = {"goal": "goal", "must": "must", "no": "NO", "missing": "missing"}[target.met(value)]
        rows.append(
            [target.key, f"{sign} {_number(target.must)}", f"{sign} {_number(target.goal)}", shown, met, target.meaning]
        )
    known = {target.key for target in targets}
    rows += [[key, "", "", _number(value), "", ""] for key, value in figures.items() if key not in known]
    _print_table(title, ["figure", "must", "goal", "value", "met", "meaning"], rows)


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of rows such as ``Benchmark.rows``; the columns are the keys in their order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        return "" if value is None else _number(value) if isinstance(value, (int, float)) else str(value)

    _print_table(title, columns, [[cell(row.get(column)) for column in columns] for row in rows])


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, instruction sets, GPUs, system."""
    about: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            about[key.strip()] = value.strip()
    flags = set((about.get("flags") or about.get("Features") or "").split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info: dict[str, Any] = {
        "cpu": about.get("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "gpus": [],
    }
    if "torch" in sys.modules:
        import torch

        info["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            info["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return info


def versions() -> dict[str, str]:
    """Python and the packages that matter, as installed (nothing is imported)."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "torch" in sys.modules:
        import torch

        found["torch"] = torch.__version__
        if torch.version.cuda:
            found["cuda"] = torch.version.cuda
    return found


def commit() -> str | None:
    """The repository's commit, with ``+changes`` when the working tree differs; None outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head}+changes" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.SubprocessError):
        return None


def _json_numbers(value: Any) -> Any:
    """JSON has no nan and no infinity: null stands for both."""
    if isinstance(value, Mapping):
        return {key: _json_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _number(value: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]
        print(title)
        for row in [columns, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in columns:
        table.add_column(
            name, justify="left" if name in ("figure", "met", "meaning") else "right", no_wrap=name == "figure"
        )
    for row in rows:
        style = "bold red" if "NO" in row or "missing" in row else None
        table.add_row(*row, style=style)
    # A log file has no width: lines are not to be folded there.
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _write_whole(path: Path, text: str) -> None:
    """Through a temporary neighbour, so that a run that is killed leaves no half JSON."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
