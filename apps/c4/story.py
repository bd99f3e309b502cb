"""What happened to one training job: steps, faults, verdicts, restarts. The timeline and the report are drawn from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class MomentKind(StrEnum):
    """What can happen to a job."""

    STARTED = "started"
    FAULT = "fault"
    """A fault was injected (known in a demo or benchmark only)."""
    VERDICT = "verdict"
    ISOLATED = "isolated"
    RESTARTED = "restarted"
    """A new generation of workers began."""
    FIRST_STEP = "first step"
    """The first new step after a restart."""
    FINISHED = "finished"


@dataclass(frozen=True)
class Moment:
    """Something that happened. ``at_s``: wall clock, seconds since the epoch, on the host that tells the story."""

    at_s: float
    kind: MomentKind
    text: str


@dataclass(frozen=True)
class StepPoint:
    """A finished optimizer step as rank 0 reported it."""

    at_s: float
    step: int
    loss: float
    generation: int


@dataclass(frozen=True)
class Story:
    """A job's run. Moments and steps ascend in time."""

    steps: tuple[StepPoint, ...]
    moments: tuple[Moment, ...]

    @property
    def began_s(self) -> float:
        times = [point.at_s for point in self.steps] + [moment.at_s for moment in self.moments]
        return min(times, default=0.0)

    def interruptions(self) -> tuple[Interruption, ...]:
        """One for each restart: from the fault (or, where none is known, the verdict) to the first new step after it."""
        found, fault, verdict, newest = [], None, None, 0
        for at_s, what in self._in_order():
            if isinstance(what, StepPoint):
                if what.step > newest:
                    newest = what.step
                continue
            if what.kind is MomentKind.FAULT:
                fault, verdict = what, None
            elif what.kind is MomentKind.VERDICT and verdict is None:
                verdict = what
            elif what.kind is MomentKind.RESTARTED:
                begin = fault or verdict or what
                first = next((p for p in self.steps if p.at_s > at_s and p.step > newest), None)
                again = next((p for p in self.steps if p.at_s > at_s), None)
                found.append(
                    Interruption(
                        fault_at_s=begin.at_s,
                        named_at_s=verdict.at_s if verdict else None,
                        restarted_at_s=at_s,
                        first_step_at_s=first.at_s if first else None,
                        steps_repeated=max(0, newest + 1 - again.step) if again else 0,
                        what=begin.text,
                    )
                )
                fault = verdict = None
        return tuple(found)

    def _in_order(self) -> Iterable[tuple[float, StepPoint | Moment]]:
        return sorted(((one.at_s, one) for one in (*self.steps, *self.moments)), key=lambda pair: pair[0])


@dataclass(frozen=True)
class Interruption:
    """From a fault to training again."""

    fault_at_s: float
    named_at_s: float | None
    restarted_at_s: float
    first_step_at_s: float | None
    """When a step ended that had not been done before the fault; None when the run ended first."""
    steps_repeated: int
    """Steps done before the fault that had to be done again."""
    what: str

    @property
    def detection_s(self) -> float | None:
        return None if self.named_at_s is None else self.named_at_s - self.fault_at_s

    @property
    def recovery_s(self) -> float | None:
        return None if self.first_step_at_s is None else self.first_step_at_s - self.fault_at_s
