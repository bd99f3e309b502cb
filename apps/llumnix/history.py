"""What a server tells of itself during a replay, as data: loads of its instances, where requests lived, migrations.

Read from Sextant's own paths of the front door (/sextant/status, /sextant/history); another OpenAI-compatible server has none of
them, and then a replay reports latencies only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apps.llumnix.client import Client, ServerError


@dataclass(frozen=True)
class Sample:
    """An instance's load at ``at_s`` (seconds since the epoch)."""

    at_s: float
    instance_id: str
    used_blocks: int
    total_blocks: int
    running: int
    waiting: int
    freeness: float
    step_ms: float
    preemptions: int


@dataclass(frozen=True)
class Stay:
    """The request was at ``instance_id`` from ``begin_s`` to ``end_s`` (seconds since the epoch); ``cause`` brought it there."""

    request_id: str
    instance_id: str
    begin_s: float
    end_s: float
    cause: str


@dataclass(frozen=True)
class Migration:
    """A migration that has ended; figures of one that did not commit are 0."""

    request_id: str
    source: str
    destination: str
    ended_s: float
    committed: bool
    outcome: str
    downtime_ms: float
    stages: int
    blocks: int
    kv_bytes: int


@dataclass(frozen=True)
class History:
    """Everything since a moment, in the order of time."""

    samples: tuple[Sample, ...] = ()
    stays: tuple[Stay, ...] = ()
    migrations: tuple[Migration, ...] = ()

    @property
    def instance_ids(self) -> list[str]:
        """All instances seen, sorted, so that a colour means the same instance in every picture."""
        found = {sample.instance_id for sample in self.samples} | {stay.instance_id for stay in self.stays}
        return sorted(found)


def short_names(instance_ids: Sequence[str]) -> dict[str, str]:
    """ "instance 1", "instance 2", ... for the long names that Serve gives."""
    return {name: f"instance {number}" for number, name in enumerate(instance_ids, start=1)}


@dataclass(frozen=True)
class Totals:
    """Counters of a server since its start."""

    preemptions: int
    migrations: int
    migration_failures: int

    def __sub__(self, earlier: Totals) -> Totals:
        return Totals(
            self.preemptions - earlier.preemptions,
            self.migrations - earlier.migrations,
            self.migration_failures - earlier.migration_failures,
        )


def read_totals(client: Client) -> Totals | None:
    """Counters at this moment; None when the server is not Sextant's."""
    try:
        status = client.status()
    except ServerError as error:
        if error.status == 404:
            return None
        raise
    counts = status.get("counts", {})
    return Totals(
        preemptions=sum(int(instance.get("preemptions") or 0) for instance in status.get("instances", ())),
        migrations=int(counts.get("migrated", 0)),
        migration_failures=int(counts.get("migration_failures", 0)),
    )


def read_history(client: Client, since: float) -> History:
    """What happened after ``since`` (seconds since the epoch); empty when the server is not Sextant's."""
    try:
        return parse_history(client.history(since))
    except ServerError as error:
        if error.status == 404:
            return History()
        raise


def parse_history(told: Mapping[str, Any]) -> History:
    """The object of /sextant/history as data."""
    samples = tuple(
        Sample(
            at_s=float(one["at"]),
            instance_id=one["instance_id"],
            used_blocks=int(one["used_blocks"]),
            total_blocks=int(one["total_blocks"]),
            running=int(one["running"]),
            waiting=int(one["waiting"]),
            freeness=_float(one.get("freeness")),
            step_ms=_float(one.get("step_ms")),
            preemptions=int(one["preemptions"]),
        )
        for one in told.get("samples", ())
    )
    migrations = tuple(_migration(one) for one in told.get("migrations", ()))
    last = max([one.at_s for one in samples] + [float(p["at"]) for p in told.get("placements", ())], default=0.0)
    return History(samples, _stays(told.get("placements", ()), last), migrations)


def _stays(placements: Any, last: float) -> tuple[Stay, ...]:
    """From "is now at" records to intervals; a request that has not ended stays until ``last``."""
    of_request: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in placements:
        of_request[record["request_id"]].append(record)
    stays = []
    for request_id, records in of_request.items():
        records.sort(key=lambda record: float(record["at"]))
        for record, following in zip(records, [*records[1:], None], strict=True):
            if record["instance_id"] is not None:
                end = last if following is None else float(following["at"])
                stays.append(Stay(request_id, record["instance_id"], float(record["at"]), end, str(record["cause"])))
    return tuple(sorted(stays, key=lambda stay: stay.begin_s))


def _migration(record: Mapping[str, Any]) -> Migration:
    report = record.get("report") or {}
    stages = report.get("stages") or 0
    return Migration(
        request_id=record.get("request_id") or "",
        source=record["source"],
        destination=record["destination"],
        ended_s=float(record["ended_at"]),
        committed=bool(record["committed"]),
        outcome=str(record["outcome"]),
        downtime_ms=_float(report.get("downtime_ms")),
        stages=stages if isinstance(stages, int) else len(stages),
        blocks=int(report.get("blocks") or 0),
        kv_bytes=int(report.get("bytes") or report.get("kv_bytes") or 0),
    )


def _float(value: Any) -> float:
    """JSON has no infinity and no nan: they come as null."""
    return float("nan") if value is None else float(value)
