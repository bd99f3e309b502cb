"""What enters and leaves the predictor: a measurement of one workload on one slice, known or asked for, and its prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass

from actors.mig.prediction.errors import PredictionError


@dataclass(frozen=True)
class Measurement:
    """One row: a workload at one batch size on one slice. ``latency_ms`` is ``None`` where it is not known."""

    gpu: str
    mode: str
    """``infer`` or ``train``."""
    workload: str
    profile: str
    batch: int
    sequence: int | None = None
    """Tokens a sequence; ``None`` for workloads without."""
    processes: int = 1
    """Processes that share the slice (MPS), each with batches of its own."""
    latency_ms: float | None = None
    """Of one batch of one process."""
    latency_std_ms: float | None = None
    gract: float | None = None
    """Graphics-engine activity, 0 to 1."""
    fb_mib: float | None = None
    """Frame buffer in use, of all processes."""
    oom: bool | None = None
    """It ran out of memory; ``None`` where that is not known."""

    @property
    def group(self) -> tuple[str, str, str]:
        """Rows of one group explain each other."""
        return (self.gpu, self.mode, self.workload)

    def check(self) -> None:
        """Raises PredictionError on a value that no measurement can have."""
        where = f"{self.workload} on {self.gpu} {self.profile}, batch {self.batch}"
        for name in ("batch", "processes", "sequence"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise PredictionError(f"{where}: {name} must be at least 1, not {count}.")
        for name in ("latency_ms", "latency_std_ms", "gract", "fb_mib"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise PredictionError(f"{where}: {name} must be a finite number that is not negative, not {value}.")
        if self.latency_ms == 0:
            raise PredictionError(
                f"{where}: latency_ms is 0: give '?' to have it predicted, or oom=1 if it did not fit."
            )


@dataclass(frozen=True)
class Prediction:
    """What a row is expected to show; ``low_ms`` to ``high_ms`` holds the latency in nine of ten cases."""

    latency_ms: float
    """As if the memory sufficed, where ``oom`` is true."""
    low_ms: float
    high_ms: float
    oom: bool
    oom_probability: float
