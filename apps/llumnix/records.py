"""What a replay measured, as data: a record a request, spreads over them, the summary of an arm, its CSV table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from apps.llumnix.history import History, Totals


@dataclass(frozen=True)
class RequestRecord:
    """What the client saw of one request; times in seconds from the replay's beginning, nan for what did not happen."""

    index: int
    request_id: str
    prompt_tokens: int
    output_tokens: int
    """Tokens asked for; with ``ignore_eos`` exactly so many come."""
    generated: int
    """Tokens received, by the server's usage."""
    due_s: float
    sent_s: float
    first_s: float = float("nan")
    last_s: float = float("nan")
    longest_gap_s: float = float("nan")
    """Longest silence between two events of the stream."""
    cached_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Time to first token, from the scheduled arrival."""
        return self.first_s - self.due_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first; nan for a single token."""
        return (self.last_s - self.first_s) / (self.generated - 1) if self.generated > 1 else float("nan")

    @property
    def e2e_s(self) -> float:
        """Scheduled arrival to last token."""
        return self.last_s - self.due_s

    @property
    def lag_s(self) -> float:
        """How late the client itself sent the request."""
        return self.sent_s - self.due_s


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles (linear interpolation, as numpy's default) of ``count`` values; nan when there are none."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        finite = np.asarray([value for value in values if np.isfinite(value)], dtype=np.float64)
        if not len(finite):
            return cls(0, *[float("nan")] * 5)
        p50, p90, p99 = np.percentile(finite, [50, 90, 99])
        return cls(len(finite), float(finite.mean()), float(p50), float(p90), float(p99), float(finite.max()))


@dataclass(frozen=True)
class Summary:
    """One replay in figures. Errors count in no latency."""

    requests: int
    errors: int
    ttft_s: Spread
    tpot_s: Spread
    e2e_s: Spread
    longest_gap_s: Spread
    lag_s: Spread
    duration_s: float
    generated_tokens: int
    tokens_per_s: float
    preemptions: int | None
    """None when the server does not tell (it is not Sextant's)."""
    migrations: int | None
    migration_failures: int | None
    migration_downtime_ms: Spread


@dataclass(frozen=True)
class ReplayResult:
    """Everything measured in one replay. ``started_at``: seconds since the epoch of second 0."""

    name: str
    origin: str
    prompts: str
    seed: int
    started_at: float
    duration_s: float
    records: tuple[RequestRecord, ...]
    totals: Totals | None
    history: History
    error_samples: tuple[str, ...] = field(default=())

    def summary(self) -> Summary:
        """Figures over the requests that were answered."""
        good = [record for record in self.records if record.error is None]
        generated = sum(record.generated for record in self.records)
        return Summary(
            requests=len(self.records),
            errors=len(self.records) - len(good),
            ttft_s=Spread.of([record.ttft_s for record in good]),
            tpot_s=Spread.of([record.tpot_s for record in good]),
            e2e_s=Spread.of([record.e2e_s for record in good]),
            longest_gap_s=Spread.of([record.longest_gap_s for record in good]),
            lag_s=Spread.of([record.lag_s for record in self.records]),
            duration_s=self.duration_s,
            generated_tokens=generated,
            tokens_per_s=generated / self.duration_s if self.duration_s > 0 else float("nan"),
            preemptions=None if self.totals is None else self.totals.preemptions,
            migrations=None if self.totals is None else self.totals.migrations,
            migration_failures=None if self.totals is None else self.totals.migration_failures,
            migration_downtime_ms=Spread.of([one.downtime_ms for one in self.history.migrations if one.committed]),
        )

    def csv(self) -> str:
        """One line a request."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        names = ["index", "request_id", "prompt_tokens", "output_tokens", "generated", "cached_tokens"]
        times = ["due_s", "sent_s", "first_s", "last_s", "longest_gap_s", "ttft_s", "tpot_s", "e2e_s", "lag_s"]
        writer.writerow([*names, *times, "error"])
        for record in self.records:
            seconds = [f"{value:.6f}" if np.isfinite(value := getattr(record, name)) else "" for name in times]
            writer.writerow([*[getattr(record, name) for name in names], *seconds, record.error or ""])
        return out.getvalue()
