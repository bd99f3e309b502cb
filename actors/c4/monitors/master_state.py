"""Generations and verdicts as JSON values and back: what a master writes down so that its successor knows it. No Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from actors.c4.diagnosis.verdict import Culprit, FaultKind, Verdict
from actors.c4.generation import Generation, Worker
from actors.c4.ports import NumberedVerdict, Stack


def generation_to(generation: Generation) -> dict[str, Any]:
    """JSON values."""
    return asdict(generation)


def generation_from(data: Mapping[str, Any]) -> Generation:
    """The generation; KeyError or TypeError when these are no values of one."""
    return Generation(int(data["number"]), tuple(Worker(**worker) for worker in data["workers"]))


def verdict_to(one: NumberedVerdict) -> dict[str, Any]:
    """JSON values."""
    return asdict(one)


def verdict_from(data: Mapping[str, Any]) -> NumberedVerdict:
    """The verdict; KeyError, TypeError or ValueError when these are no values of one."""
    raw = dict(data["verdict"])
    link = raw["culprit"]["link"]
    culprit = Culprit(
        ranks=tuple(raw["culprit"]["ranks"]),
        link=None if link is None else (int(link[0]), int(link[1])),
        nodes=tuple(raw["culprit"]["nodes"]),
    )
    verdict = Verdict(**raw | {"kind": FaultKind(raw["kind"]), "culprit": culprit, "evidence": tuple(raw["evidence"])})
    others = {"verdict": verdict, "nodes": tuple(data["nodes"]), "stacks": tuple(Stack(**s) for s in data["stacks"])}
    return NumberedVerdict(**dict(data) | others)
