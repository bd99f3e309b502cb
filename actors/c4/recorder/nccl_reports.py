"""Reads what NCCL itself tells: RAS reports (``ncclras -f json``) and the profiler inspector's JSON lines. No torch, no Ray.

RAS (NCCL 2.24 and later, JSON since 2.28) counts the operations of every rank of every communicator: a rank that lags is one that
others wait for. The inspector (the profiler plugin in NCCL's source) times every collective on the device.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.c4.recorder.errors import RecorderError

RAS_ADDRESS_VARIABLE = "NCCL_RAS_ADDR"
_QUERY_S = 5
# NCCL 2.28.9 writes no comma before a key that follows a list or number in ``missing_ranks``.
_LOST_COMMA = re.compile(r'(["\d}\]el])(\s*\n\s*)("[^"\n]*"\s*:)')


@dataclass(frozen=True)
class RasRank:
    """A rank of a communicator as RAS knows it."""

    rank: int
    """In the communicator."""
    host: str
    pid: int
    running: bool
    """Initialised, not aborted and not finalising."""
    missing: bool
    """Its process does not answer RAS."""
    counts: Mapping[str, int]
    """Operations begun, by NCCL's name of the type; empty when missing."""

    @property
    def operations(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class RasCommunicator:
    """A communicator and its ranks."""

    name: str
    """NCCL's hash."""
    size: int
    ranks: tuple[RasRank, ...]

    @property
    def lagging(self) -> tuple[int, ...]:
        """Ranks whose count of some operation is behind the highest, while all that answer are running; and missing ones."""
        missing = tuple(one.rank for one in self.ranks if one.missing)
        present = [one for one in self.ranks if not one.missing]
        if not all(one.running for one in present):
            return missing
        types = {name for one in present for name in one.counts}
        highest = {name: max(one.counts.get(name, 0) for one in present) for name in types}
        behind = (
            one.rank for one in present if any(one.counts.get(name, 0) < count for name, count in highest.items())
        )
        return tuple(sorted((*behind, *missing)))


@dataclass(frozen=True)
class InspectedCollective:
    """A collective that the inspector timed at one rank."""

    communicator: str
    rank: int
    ranks: int
    name: str
    """NCCL's ("AllReduce")."""
    sequence: int
    payload: int
    """Bytes."""
    duration_us: float
    source: str
    """Of the time: "kernel_gpu" is the device's own."""
    bus_gb_per_s: float
    hostname: str
    pid: int
    dumped_us: int
    """Wall clock of the dump, microseconds since the epoch."""


def parse_ras(text: str) -> tuple[RasCommunicator, ...]:
    """What ``ncclras -f json`` printed.

    Raises:
        RecorderError: it is not that.
    """
    try:
        try:
            data = json.loads(text)
        except json.JSONDecodeError:
            data = json.loads(_LOST_COMMA.sub(r"\1,\2\3", text))
        return tuple(_communicator(one) for one in data["communicators"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecorderError(f"This is no report of ncclras in JSON: {error!r}.") from error


def query_ras(binary: str = "ncclras", timeout_s: float = _QUERY_S) -> tuple[RasCommunicator, ...] | None:
    """Ask the RAS thread of this host's job, at ``NCCL_RAS_ADDR`` when that is set; None when there is no ``ncclras``.

    Raises:
        RecorderError: it fails, is too old for JSON, or answers nonsense.
    """
    command = [binary, "-f", "json", "-t", str(max(1, int(timeout_s)))]
    if address := os.environ.get(RAS_ADDRESS_VARIABLE):
        host, _, port = address.strip().rpartition(":")
        command += ["-h", host.strip("[]"), "-p", port]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s + 1, check=False)
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired as error:
        raise RecorderError(f"{binary} did not answer within {timeout_s:g} s.") from error
    if done.returncode != 0:
        raise RecorderError(f"{binary} ended with code {done.returncode}: {done.stderr.strip()[:300]}")
    return parse_ras(done.stdout)


def parse_inspector(lines: Iterator[str]) -> Iterator[InspectedCollective]:
    """Collectives from the inspector's JSON lines; what is cut off, and records of another kind, are left out."""
    for line in lines:
        try:
            record = json.loads(line)
            head, about, collective = record["header"], record.get("metadata") or {}, record["coll_perf"]
            yield InspectedCollective(
                str(head.get("id", "")), int(head["rank"]), int(head["n_ranks"]), str(collective["coll"]),
                int(collective["coll_sn"]), int(collective["coll_msg_size_bytes"]), float(collective["coll_exec_time_us"]),
                str(collective.get("coll_timing_source", "")), float(collective.get("coll_busbw_gbs") or 0.0),
                str(about.get("hostname", "")), int(about.get("pid", 0)), int(about.get("dump_timestamp_us", 0)),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError):
            continue


def read_inspector(folder: Path) -> list[InspectedCollective]:
    """All of a folder's ``.log`` and ``.jsonl`` files, also gzipped."""
    found: list[InspectedCollective] = []
    for path in sorted(folder.iterdir()):
        plain = path.with_suffix("") if path.suffix == ".gz" else path
        if plain.suffix not in (".log", ".jsonl"):
            continue
        try:
            with (
                gzip.open(path, "rt", errors="replace") if path.suffix == ".gz" else path.open(errors="replace") as file
            ):
                found += parse_inspector(iter(file))
        except (OSError, EOFError):  # a file that is still being written, or was cut off
            continue
    return found


def _communicator(data: Mapping[str, Any]) -> RasCommunicator:
    ranks = [_rank(one, missing=False) for one in data["ranks"]]
    ranks += [_rank(one, missing=True) for one in data.get("missing_ranks") or ()]
    return RasCommunicator(str(data["hash"]), int(data["size"]), tuple(sorted(ranks, key=lambda one: one.rank)))


def _rank(data: Mapping[str, Any], *, missing: bool) -> RasRank:
    status = data.get("status") or {}
    stopped = any(status.get(name) for name in ("abort_flag", "finalize_called", "destroy_flag"))
    counts = {} if missing else {name: int(count) for name, count in data["collective_counts"].items()}
    return RasRank(
        int(data["rank"]), str(data.get("host", "")), int(data.get("pid", 0)),
        not missing and not stopped and status.get("init_state", 0) == 0, missing, counts,
    )  # fmt: skip
