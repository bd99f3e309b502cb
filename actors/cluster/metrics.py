"""The one metrics naming: every live figure is ``sextant_<system>_<what>_<unit>`` in ``ray.util.metrics``.

Ray puts ``ray_`` before the name and ``_total`` behind a counter's when it exports to Prometheus. Outside a Ray process
(a unit test, a machine without Ray) a metric accepts the same calls and does nothing.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["UNITS", "Metric", "counter", "gauge", "histogram", "metric_name"]

UNITS = (
    "seconds",
    "milliseconds",
    "bytes",
    "tokens",
    "blocks",
    "requests",
    "instances",
    "steps",
    "samples",
    "events",
    "errors",
    "workers",
    "nodes",
    "gpus",
    "slices",
    "words",
    "ratio",
    "percent",
    "watts",
    "joules",
    "meters",
    "bytes_per_second",
    "tokens_per_second",
    "requests_per_second",
    "samples_per_second",
)
_WORD = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def metric_name(system: str, what: str, unit: str) -> str:
    """``sextant_<system>_<what>_<unit>``.

    Raises:
        ValueError: a part is no lower-case snake_case word, the unit is unknown, or ``what`` repeats the unit.
    """
    for part, text in (("system", system), ("what", what)):
        if not _WORD.fullmatch(text):
            raise ValueError(f"A metric's {part} must be lower-case words joined by underscores, not {text!r}.")
    if unit not in UNITS:
        raise ValueError(f"A metric's unit cannot be {unit!r}; allowed: {', '.join(UNITS)}.")
    if what == unit or what.endswith(f"_{unit}"):
        raise ValueError(f"The metric {what!r} repeats its unit {unit!r}: the name ends with the unit by itself.")
    if what.endswith("_total"):
        raise ValueError(f"The metric {what!r} must not end with _total: Prometheus export adds it to counters.")
    return f"sextant_{system}_{what}_{unit}"


class Metric:
    """A counter, gauge or histogram that begins to exist in Ray when first used inside a Ray process.

    Late, because modules name their metrics when they are imported, often before Ray runs. Tags not in ``tags`` are errors
    inside Ray and outside alike, so that a test without Ray notices them.
    """

    def __init__(self, kind: str, name: str, help: str, tags: Sequence[str], buckets: Sequence[float] = ()):
        self.kind, self.name, self.help, self.tags = kind, name, help, tuple(tags)
        self.buckets = tuple(buckets)
        self._metric: Any = None

    def increase(self, value: float = 1.0, **tags: str) -> None:
        """Adds to a counter; ``value`` > 0 (0 is ignored)."""
        self._require("counter", tags)
        if value < 0:
            raise ValueError(f"The counter {self.name} cannot decrease (by {value}).")
        if value > 0 and (metric := self._in_ray()) is not None:
            metric.inc(value, tags=tags)

    def set(self, value: float, **tags: str) -> None:
        """Sets a gauge."""
        self._require("gauge", tags)
        if (metric := self._in_ray()) is not None:
            metric.set(value, tags=tags)

    def observe(self, value: float, **tags: str) -> None:
        """Adds an observation to a histogram."""
        self._require("histogram", tags)
        if (metric := self._in_ray()) is not None:
            metric.observe(value, tags=tags)

    def _require(self, kind: str, tags: Mapping[str, str]) -> None:
        if self.kind != kind:
            raise TypeError(f"{self.name} is a {self.kind}, not a {kind}.")
        if set(tags) != set(self.tags):
            raise ValueError(f"{self.name} wants the tags {sorted(self.tags)}, not {sorted(tags)}.")

    def _in_ray(self) -> Any:
        if self._metric is None:
            # Importing Ray here would start pulling it into processes that have none.
            ray = sys.modules.get("ray")
            if ray is None or not ray.is_initialized():
                return None
            from ray.util import metrics

            if self.kind == "histogram":
                self._metric = metrics.Histogram(
                    self.name, self.help, boundaries=list(self.buckets), tag_keys=self.tags
                )
            else:
                kind = metrics.Counter if self.kind == "counter" else metrics.Gauge
                self._metric = kind(self.name, self.help, tag_keys=self.tags)
        return self._metric

    def __reduce__(self) -> tuple[Any, ...]:
        return (Metric, (self.kind, self.name, self.help, self.tags, self.buckets))


def counter(system: str, what: str, unit: str, *, help: str = "", tags: Sequence[str] = ()) -> Metric:
    """What only grows, e.g. ``counter("llumnix", "generated", "tokens")``."""
    return Metric("counter", metric_name(system, what, unit), help, tags)


def gauge(system: str, what: str, unit: str, *, help: str = "", tags: Sequence[str] = ()) -> Metric:
    """What goes up and down, e.g. ``gauge("llumnix", "free_kv", "blocks", tags=["instance"])``."""
    return Metric("gauge", metric_name(system, what, unit), help, tags)


def histogram(
    system: str, what: str, unit: str, *, buckets: Sequence[float], help: str = "", tags: Sequence[str] = ()
) -> Metric:
    """A distribution; ``buckets`` are ascending positive upper bounds in the metric's unit."""
    bounds = list(buckets)
    if not bounds or bounds[0] <= 0 or any(low >= high for low, high in itertools.pairwise(bounds)):
        raise ValueError(f"The buckets of {system} {what} must be positive and ascending, not {bounds}.")
    return Metric("histogram", metric_name(system, what, unit), help, tags, bounds)
