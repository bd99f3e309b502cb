"""A month of a large training job with faults, event by event: where the time goes under C4 and under Ray Train's defaults.

Both arms meet the same faults (same seed: kind, moment, whether the hardware stays broken). Four rows, as the paper's table has
them: lost work (done again since the last checkpoint), detection, diagnosis and isolation, re-initialisation. All figures are
those of this simulation under the assumptions of ``MonthConfig``; none is measured on such a cluster and none is the paper's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from pydantic import Field

from actors.c4.diagnosis.verdict import FaultClass, FaultKind
from apps.program.config import Config
from apps.program.errors import UserError


class FaultMix(Config):
    """Shares of the faults by what happens to the job; they need not add up to one."""

    crash: float = Field(default=0.40, ge=0)
    """A process dies, or its node: peers' connections break or it is seen at once."""
    frozen: float = Field(default=0.15, ge=0)
    """A process or node answers nothing any more, yet no connection breaks."""
    hang: float = Field(default=0.25, ge=0)
    """All processes answer; a collective never ends (stuck rank, wrong collective, dead link)."""
    slow: float = Field(default=0.20, ge=0)
    """A rank or link becomes slow and takes the job with it."""


class C4Assumptions(Config):
    """Ours."""

    peer_checkpoint_steps: int = Field(default=1, ge=1)
    """Steps between copies in a peer node's memory."""
    disk_checkpoint_s: float = Field(default=1800, gt=0)
    """Copies on disk: needed when a node and its peer are lost together."""
    both_lost: float = Field(default=0.01, ge=0, le=1)
    """Share of crashes in which that happens."""
    detect_crash_s: float = Field(default=0.7, gt=0)
    """Named after so long (mean), unless a benchmark's result is given."""
    hang_steps: float = Field(default=6.0, gt=0)
    """Hangs are named after so many steps: the threshold of 5.5, the peers' arrival and a report."""
    slow_steps: float = Field(default=4.0, gt=0)
    """Slowness is named after so many (slow) steps."""
    isolate_s: float = Field(default=3.0, gt=0)
    """Quarantine of the node, fencing of the old workers, choice of a spare (mean)."""
    misses: float = Field(default=0.02, ge=0, le=1)
    """Share of faults whose culprit is not named right: the node stays in, and the fault comes back."""


class DefaultAssumptions(Config):
    """Ray Train V2's defaults, with people who look after the job."""

    poll_s: float = Field(default=2.0, gt=0)
    """Workers are polled this often: a crash is seen within it."""
    health_timeout_s: float = Field(default=600, gt=0)
    """A worker that does not answer counts as unhealthy after this."""
    collective_timeout_s: float = Field(default=1800, gt=0)
    """A hung collective whose workers answer ends by its own timeout."""
    start_timeout_s: float = Field(default=60, gt=0)
    """The restart waits so long for a node that is gone before it goes on without it."""
    checkpoint_s: float = Field(default=3600, gt=0)
    """Between checkpoints: each stops the job, so users take few."""
    notice_slow_s: float = Field(default=4 * 3600, gt=0)
    """Nothing reports slowness: people notice it on a curve after so long (mean)."""
    people_after: int = Field(default=2, ge=1)
    """People look when the same fault has come so many times."""
    people_s: float = Field(default=2400, gt=0)
    """... and need so long (mean) to find the node and take it out."""


class MonthConfig(Config):
    """What `month` replays."""

    gpus: int = Field(default=2400, ge=8)
    days: float = Field(default=30, gt=0)
    faults: int = Field(default=40, ge=0)
    step_s: float = Field(default=12.0, gt=0)
    """A step of the job in health; hang thresholds are multiples of it."""
    slowdown: tuple[float, float] = (1.5, 3.0)
    """Of slow faults: the job's steps take so many times as long."""
    stays_broken: float = Field(default=0.6, ge=0, le=1)
    """Share of faults whose hardware is still broken after a restart (the rest were transient)."""
    returns_s: float = Field(default=1800, gt=0)
    """A part that is still broken and still in use fails again after so long (mean)."""
    reinit_s: float = Field(default=120.0, gt=0)
    """Start of processes, communicators, loading of state; equal for both arms."""
    reinit_spread: float = Field(default=0.2, ge=0, lt=1)
    months: int = Field(default=300, ge=2)
    """Replays, for the intervals."""
    seed: int = 0
    mix: FaultMix = FaultMix()
    c4: C4Assumptions = C4Assumptions()
    default: DefaultAssumptions = DefaultAssumptions()


class Row(StrEnum):
    """Where time goes."""

    LOST = "lost work"
    DETECTION = "detection"
    ISOLATION = "diagnosis and isolation"
    REINIT = "re-initialisation"


@dataclass(frozen=True)
class Month:
    """One replay of one arm: share of the month by row."""

    shares: Mapping[Row, float]
    restarts: int

    @property
    def total(self) -> float:
        return sum(self.shares.values())


@dataclass(frozen=True)
class MeasuredTimes:
    """Detection times of a benchmark's live trials, by class; seconds."""

    by_class: Mapping[str, tuple[float, ...]]
    origin: str


def read_measured(path: Path) -> MeasuredTimes:
    """Detection times from the JSON of ``benchmarks.c4_diagnosis``.

    Raises:
        UserError: no such file, no JSON, or no trials with a detection time in it.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8")).get("rows", [])
        found: dict[str, list[float]] = {}
        for row in rows:
            seconds, name = row.get("detection_s"), _class_of(row.get("expected", row.get("class")))
            if isinstance(seconds, (int, float)) and name and math.isfinite(seconds) and row.get("right", True):
                found.setdefault(name, []).append(float(seconds))
    except OSError as error:
        raise UserError(f"The benchmark result {path} cannot be read: {error.strerror}.") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not the JSON of a benchmark.") from error
    if not found:
        raise UserError(
            f"{path} holds no trials with a class and a detection_s: give the result of benchmarks.c4_diagnosis."
        )
    return MeasuredTimes({name: tuple(times) for name, times in found.items()}, str(path))


def _class_of(name: object) -> str | None:
    """The class that a name of a class, or of a kind, stands for."""
    if name in list(FaultClass):
        return str(name)
    return FaultKind(str(name)).fault_class.value if name in list(FaultKind) else None


@dataclass(frozen=True)
class _Fault:
    """Drawn once for both arms; ``draws`` are uniform numbers that each arm spends in its own way."""

    after_s: float
    """Seconds since the month's begin when it first strikes; what falls into a standstill strikes when the job trains again."""
    kind: str
    broken: bool
    slowdown: float
    seed: int


def replay(config: MonthConfig, measured: MeasuredTimes | None = None) -> dict[str, list[Month]]:
    """``months`` replays of both arms (keys "c4" and "default"), the same faults for each pair."""
    result: dict[str, list[Month]] = {"c4": [], "default": []}
    for index in range(config.months):
        rng = np.random.default_rng([config.seed, index])
        faults = _draw(config, rng)
        for arm, months in result.items():
            months.append(_run(config, faults, arm == "c4", measured))
    return result


def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, 5 %, 95 %) over replays."""
    return float(np.mean(values)), float(np.percentile(values, 5)), float(np.percentile(values, 95))


def _draw(config: MonthConfig, rng: np.random.Generator) -> list[_Fault]:
    weights = config.mix.model_dump()
    total = sum(weights.values())
    if total <= 0:
        raise UserError("month.mix: at least one share must be above 0.")
    span = config.days * 86400
    times = np.sort(rng.uniform(0, span, config.faults))
    kinds = rng.choice(list(weights), size=config.faults, p=[weight / total for weight in weights.values()])
    return [
        _Fault(float(at), str(kind), bool(rng.random() < config.stays_broken), float(rng.uniform(*config.slowdown)),
               int(rng.integers(2**31)))
        for at, kind in zip(times, kinds, strict=True)
    ]  # fmt: skip


def _run(config: MonthConfig, faults: list[_Fault], ours: bool, measured: MeasuredTimes | None) -> Month:
    """Walks through the month: train until the next event, pay for it, go on. Faults strike a job that trains."""
    span = config.days * 86400
    spent = dict.fromkeys(Row, 0.0)
    clock, restarts = 0.0, 0
    waiting = list(faults)
    # Parts that stay broken come back: (wall time, fault, times it has come, its random numbers).
    coming: list[tuple[float, _Fault, int, np.random.Generator]] = []
    while True:
        first = min(coming, key=lambda one: one[0], default=None)
        fresh = waiting[0] if waiting else None
        at = min(first[0] if first else np.inf, fresh.after_s if fresh else np.inf)
        if at >= span:
            break
        if first is not None and first[0] == at:
            coming.remove(first)
            _, fault, times, rng = first
        else:
            fault, times, rng = waiting.pop(0), 0, np.random.default_rng(fresh.seed if fresh else 0)
        clock = max(clock, at)
        cost, removed = (_ours if ours else _default)(config, fault, times, rng, measured)
        # The month ends for everything; what is beyond it belongs to the next one.
        for row, seconds in cost.items():
            part = min(seconds, span - clock)
            spent[row] += part
            clock += part
        restarts += 1
        if fault.broken and not removed and clock < span:
            coming.append((clock + float(rng.exponential(config.returns_s)), fault, times + 1, rng))
        # What was due while the job stood strikes when it trains again.
        coming = [(max(when, clock), *rest) for when, *rest in coming]  # type: ignore[misc]
    return Month({row: seconds / span for row, seconds in spent.items()}, restarts)


def _reinit(config: MonthConfig, rng: np.random.Generator) -> float:
    return config.reinit_s * float(rng.uniform(1 - config.reinit_spread, 1 + config.reinit_spread))


def _ours(config, fault, times, rng, measured) -> tuple[dict[Row, float], bool]:  # type: ignore[no-untyped-def]
    own = config.c4
    match fault.kind:
        case "slow":
            elapsed = _measured(measured, ("communication_slow", "non_communication_slow"), rng,
                                own.slow_steps * config.step_s * fault.slowdown, at_least=True)  # fmt: skip
            detection = elapsed * (1 - 1 / fault.slowdown)  # the job trains meanwhile, at its pace
        case "crash":
            detection = _measured(
                measured, ("non_communication_hang",), rng, float(rng.exponential(own.detect_crash_s)), False
            )
        case _:
            detection = _measured(
                measured, ("non_communication_hang", "communication_hang"), rng, own.hang_steps * config.step_s, True
            )
    lost = float(rng.uniform(0, own.peer_checkpoint_steps * config.step_s))
    if fault.kind == "crash" and rng.random() < own.both_lost:
        lost = float(rng.uniform(0, own.disk_checkpoint_s))
    isolation = float(rng.exponential(own.isolate_s))
    named = bool(rng.random() >= own.misses)
    return {Row.DETECTION: detection, Row.ISOLATION: isolation, Row.REINIT: _reinit(config, rng), Row.LOST: lost}, named


def _default(config, fault, times, rng, measured) -> tuple[dict[Row, float], bool]:  # type: ignore[no-untyped-def]
    ray = config.default
    isolation = 0.0
    match fault.kind:
        case "slow":
            # Nobody restarts a slow job: it goes on, slower, until people see it, look, and take the part out.
            noticed = float(rng.exponential(ray.notice_slow_s))
            people = float(rng.exponential(ray.people_s))
            share = 1 - 1 / fault.slowdown
            cost = {Row.DETECTION: noticed * share, Row.ISOLATION: people * share, Row.REINIT: _reinit(config, rng),
                    Row.LOST: float(rng.uniform(0, ray.checkpoint_s))}  # fmt: skip
            return cost, True
        case "crash":
            detection = float(rng.uniform(0, ray.poll_s))
            isolation = ray.start_timeout_s
        case "frozen":
            detection = ray.health_timeout_s + float(rng.uniform(0, ray.poll_s))
            isolation = ray.start_timeout_s
        case _:
            detection = ray.collective_timeout_s
    removed = times + 1 >= ray.people_after
    if removed and fault.broken:
        isolation += float(rng.exponential(ray.people_s))
    lost = float(rng.uniform(0, ray.checkpoint_s))
    return {
        Row.DETECTION: detection,
        Row.ISOLATION: isolation,
        Row.REINIT: _reinit(config, rng),
        Row.LOST: lost,
    }, removed


def _measured(
    measured: MeasuredTimes | None, classes: tuple[str, ...], rng: np.random.Generator, assumed: float, at_least: bool
) -> float:
    """A detection time: one of the measured ones; where the threshold is a multiple of the step, not below that."""
    times = [seconds for name in classes for seconds in (measured.by_class.get(name, ()) if measured else ())]
    if not times:
        return assumed
    drawn = float(times[int(rng.integers(len(times)))])
    return max(drawn, assumed) if at_least else drawn
