"""The verb `diagnose`: names the culprits in a folder of PyTorch Flight Recorder dumps, for people or as one JSON object."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from actors.c4.flight_recorder import Diagnosis, FlightRecorderError, Limits, diagnose_folder
from apps.c4.config import C4Config
from apps.program.errors import UserError
from apps.program.report import print_table

_SHOWN_EVIDENCE = 12
_CLASSES = {
    "communication_hang": "communication hang",
    "non_communication_hang": "non-communication hang",
    "healthy": "healthy: nothing is outstanding",
}


def diagnose(
    config: C4Config,
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder with the dumps of all ranks (_dump_0, rank_1.json, ...).")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Name the culprit ranks and the collective from Flight Recorder dumps (pickle or JSON, any PyTorch version)."""
    limits = Limits(file_bytes=config.dumps.max_file_mib << 20, files=config.dumps.max_files)
    try:
        verdict = diagnose_folder(Path(folder), limits)
    except FlightRecorderError as error:
        raise UserError(str(error)) from error
    if as_json:
        json.dump(as_object(verdict), sys.stdout)
        sys.stdout.write("\n")
    else:
        _print(folder, verdict)


def as_object(verdict: Diagnosis) -> dict[str, Any]:
    """The JSON form: culprit_ranks, class, process_group, evidence, and what else is known."""
    return {
        "culprit_ranks": list(verdict.culprit_ranks),
        "class": verdict.fault_class.value,
        "process_group": verdict.process_group,
        "evidence": list(verdict.evidence),
        "collective": verdict.collective,
        "sequence": verdict.sequence,
        "confidence": verdict.confidence,
        "suspect_ranks": list(verdict.suspects),
        "culprits": [
            {"rank": finding.rank, "cause": finding.cause.value, "why": finding.sentence}
            for finding in verdict.findings
        ],
        "world_size": verdict.world_size,
        "ranks_read": verdict.ranks_read,
        "ranks_missing": list(verdict.silent),
        "warnings": list(verdict.warnings),
    }


def _print(folder: str, verdict: Diagnosis) -> None:
    operation = f"{verdict.collective} #{verdict.sequence}" if verdict.collective is not None else "none"
    culprits = ", ".join(str(rank) for rank in verdict.culprit_ranks)
    if not culprits:
        culprits = "none" if verdict.fault_class == "healthy" else "not determined by the dumps"
    rows: list[list[str]] = [
        ["class", _CLASSES[verdict.fault_class.value]],
        ["culprit ranks", culprits],
        ["process group", verdict.process_group or "none"],
        ["operation", operation],
        ["confidence", verdict.confidence],
        ["ranks read", f"{verdict.ranks_read} of {verdict.world_size}"],
    ]
    if verdict.suspects:
        rows.insert(2, ["suspect ranks", ", ".join(str(rank) for rank in verdict.suspects)])
    print_table(["", "verdict"], rows, title=f"Flight Recorder dumps in {folder}")
    console = Console(highlight=False, markup=False)
    for title, sentences in (("Evidence", verdict.evidence), ("Warnings", verdict.warnings)):
        if sentences:
            console.print(f"\n{title}")
        for sentence in sentences[:_SHOWN_EVIDENCE]:
            console.print(f"  {sentence}")
        if len(sentences) > _SHOWN_EVIDENCE:
            console.print(f"  ... and {len(sentences) - _SHOWN_EVIDENCE} more (--json shows them)")
