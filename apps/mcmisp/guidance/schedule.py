"""The weight of guidance over the steps: starts when mistakes begin to say something, and fades out."""

from __future__ import annotations

from typing import Any

from apps.mcmisp.guidance.config import GuidanceConfig

SMOOTHING = 0.9


class WeightSchedule:
    """Asked for the weight of a step, told its error rate afterwards; its state goes into checkpoints."""

    def __init__(self, config: GuidanceConfig, steps: int):
        self.config, self.steps = config, steps
        self.error_rate: float | None = None
        """Running mean of the share of masked words that are mis-predicted."""
        self.started_at: int | None = 0 if config.start_error_rate >= 1 else None

    def weight(self, step: int) -> float:
        """0 until the start; then constant, or linear warm-up followed by linear decay to 0 at the last step."""
        if self.started_at is None or step < self.started_at:
            return 0.0
        if self.config.schedule == "constant":
            return self.config.weight
        since, warmup = step - self.started_at, self.config.warmup_steps
        rise = min(1.0, (since + 1) / (warmup + 1))
        top = self.started_at + warmup
        fall = 1.0 if step <= top else max(0.0, (self.steps - step) / max(1, self.steps - top))
        return self.config.weight * min(rise, fall)

    def observe(self, step: int, error_rate: float) -> None:
        """The share of masked words mis-predicted in ``step``, over all workers."""
        previous = error_rate if self.error_rate is None else self.error_rate
        self.error_rate = SMOOTHING * previous + (1 - SMOOTHING) * error_rate
        if self.started_at is None and self.error_rate < self.config.start_error_rate:
            self.started_at = step + 1

    def state_dict(self) -> dict[str, Any]:
        return {"error_rate": self.error_rate, "started_at": self.started_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.error_rate, self.started_at = state["error_rate"], state["started_at"]


__all__ = ["WeightSchedule"]
