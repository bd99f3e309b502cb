"""Reports: of one training or pruning, and of a sweep (score against sparsity per pattern, block sizes, weight maps)."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.balanced_sparsity.maps import LayerCount, corner, layer_counts
from apps.balanced_sparsity.pictures import (
    TrialResult,
    block_size_figure,
    course_figure,
    score_figure,
    weight_map_figure,
)
from apps.balanced_sparsity.store import Trained
from apps.program.errors import UserError
from apps.program.report import Report, print_table
from apps.program.run_folder import RunFolder

MAPS_FILE = "maps.npz"
Maps = Mapping[str, NDArray[np.float32]]


def figure_rows(trained: Trained) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a network's figures."""
    return ["figure", "value"], [[key, float(value)] for key, value in trained.figures.items()]


def layer_rows(counts: Sequence[LayerCount]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table of layers."""
    columns = ["matrix", "rows", "columns", "zeros (%)", "columns of a block", "fewest non-zeros", "most non-zeros"]
    rows: list[list[Any]] = [
        [one.name, one.rows, one.columns, 100 * one.zeros, one.block, one.least, one.most] for one in counts
    ]
    return columns, rows


def write_training_report(folder: RunFolder, trained: Trained, title: str) -> str:
    """result.json, pictures and report.html of one run; prints the table. Returns the report's path."""
    block = block_of(trained.pattern)
    counts = layer_counts(trained.model(), block, trained.config.pruning.skip if trained.pattern else ())
    print_table(*figure_rows(trained), title=title)
    summary = f"{trained.config.model.name} on {trained.config.data.name}, {trained.steps} steps"
    if trained.pattern is not None:
        summary += f", {trained.pattern}, {100 * trained.sparsity:.1f} % zeros"
    report = Report(title, summary + ".")
    report.add_table("Figures", *figure_rows(trained))
    report.add_figure("Course", course_figure(trained.history, trained.score))
    report.add_table("Weights that can be pruned", *layer_rows(counts), caption="Matrices as pruning lays them out.")
    if trained.pattern is not None:
        maps = {trained.pattern: corner(trained.model(), trained.config.pruning.skip)}
        report.add_figure(
            "Weight map", weight_map_figure(maps, _lines(trained.pattern)), "Corner of the largest matrix."
        )
    folder.write_result({
        "model": trained.config.model.name, "data": trained.config.data.name, "steps": trained.steps,
        "pattern": trained.pattern, "sparsity": trained.sparsity, "score": trained.score, "figures": trained.figures,
        "layers": counts, "history": trained.history,
    })  # fmt: skip
    return report.write(folder)


def write_sweep(
    folder: RunFolder, results: Sequence[tuple[TrialResult, Trained]], dense: Trained | None, score: str
) -> str:
    """result.json, the maps, pictures and report.html of a sweep; prints the table. Returns the report's path."""
    trials = [trial for trial, _ in results]
    maps: dict[str, NDArray[np.float32]] = {}
    skip = results[0][1].config.pruning.skip
    if dense is not None:
        maps["dense"] = corner(dense.model(), skip)
    # Of the middle sparsity and the first seed, one map a pattern.
    wanted = sorted({trial.wanted for trial in trials})
    shown, seed = wanted[len(wanted) // 2], trials[0].seed
    for trial, trained in results:
        if trial.wanted == shown and trial.seed == seed:
            maps[trial.pattern] = corner(trained.model(), skip)
    dense_score = None if dense is None else dense.figures[score]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **maps)  # type: ignore[arg-type]
    folder.write_bytes(MAPS_FILE, buffer.getvalue())
    about = f"{results[0][1].config.model.name} on {results[0][1].config.data.name}"
    folder.write_result({
        "kind": "sweep", "about": about, "score": score, "dense": dense_score, "trials": [asdict(trial) for trial in trials],
    })  # fmt: skip
    print_table(*trial_rows(trials, score), title=f"{about}: {score}, dense {_shown(dense_score)}")
    return sweep_report(trials, maps, score, dense_score, about).write(folder)


def trial_rows(trials: Sequence[TrialResult], score: str) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table of trials."""
    rows: list[list[Any]] = [
        [one.pattern, 100 * one.wanted, 100 * one.sparsity, one.seed, one.score, one.seconds] for one in trials
    ]
    return ["pattern", "asked (%)", "zeros (%)", "seed", score, "seconds"], rows


def sweep_report(trials: Sequence[TrialResult], maps: Maps, score: str, dense: float | None, about: str) -> Report:
    """The report of ``trials``."""
    report = Report(
        "Balanced sparsity: sweep", f"{about}; {len(trials)} pruned networks; dense {score} {_shown(dense)}."
    )
    report.add_figure(f"{score} against sparsity", score_figure(trials, score, dense), name="score_against_sparsity")
    sizes = block_size_figure(trials, score, dense)
    if sizes is not None:
        report.add_figure("Sensitivity to the block size", sizes, "Balanced patterns only.", name="block_size")
    if maps:
        report.add_figure(
            "Weight maps", weight_map_figure(maps), "The same corner of the largest matrix.", name="weight_maps"
        )  # fmt: skip
    report.add_table("Trials", *trial_rows(trials, score))
    return report


def read_sweep(folder: Path) -> tuple[list[TrialResult], dict[str, NDArray[np.float32]], str, float | None, str]:
    """(trials, maps, score, dense score, about) of a sweep's run folder.

    Raises:
        UserError: it is none.
    """
    path = folder.expanduser() / "result.json"
    try:
        told = json.loads(path.read_text())
        if told["kind"] != "sweep":
            raise KeyError("kind")
        nan = {"score": math.nan}  # JSON has none: a network that went astray has null there
        trials = [TrialResult(**{**one, **({} if one["score"] is not None else nan)}) for one in told["trials"]]
        maps_path = folder.expanduser() / MAPS_FILE
        maps = dict(np.load(maps_path, allow_pickle=False)) if maps_path.exists() else {}
        return trials, maps, told["score"], told["dense"], told["about"]
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no result.json: it is no run folder of `sweep`.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no result of `sweep`.") from error


def block_of(pattern: str | None) -> int:
    """Columns of the blocks that a table of layers counts in."""
    _, _, size = (pattern or "").partition(":")
    if pattern == "2:4":
        return 4
    if pattern and pattern.startswith("balanced:"):
        return int(size.split("x")[0])
    return 32


def _lines(pattern: str) -> int | None:
    return block_of(pattern) if pattern == "2:4" or pattern.startswith("balanced") else None


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
