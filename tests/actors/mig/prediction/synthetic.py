"""Workloads whose law is known, written without the code under test: the formula in plain floats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actors.mig.prediction import Measurement

SHARES = {"1g.10gb": (14 / 108, 1 / 8), "2g.20gb": (28 / 108, 2 / 8), "3g.40gb": (42 / 108, 4 / 8),
          "4g.40gb": (56 / 108, 4 / 8), "7g.80gb": (98 / 108, 1.0)}  # fmt: skip
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Truth:
    """Milliseconds on an A100-80GB."""

    floor_ms: float = 8.0
    host_ms: float = 0.0
    work_ms: float = 0.4
    weights: float = 0.5
    """As a number of samples."""
    bound_by_memory: float = 0.3
    sharpness: float = 6.0

    def latency_ms(self, batch: int, profile: str, sequence: int | None = None, processes: int = 1) -> float:
        sm_share, bandwidth_share = SHARES[profile]
        slow = sm_share ** -(1 - self.bound_by_memory) * bandwidth_share**-self.bound_by_memory
        work = self.work_ms * processes * (batch + self.weights) * ((sequence or 64) / 64) ** 1.1 * slow
        floor = self.floor_ms + self.host_ms * batch
        return (floor**self.sharpness + work**self.sharpness) ** (1 / self.sharpness)


def measured(
    truth: Truth,
    profiles=tuple(SHARES),
    batches=BATCHES,
    *,
    name="net",
    noise=0.0,
    seed=0,
    sequences=(None,),
    processes=(1,),
) -> list[Measurement]:
    rng = np.random.default_rng(seed)
    return [
        Measurement("A100-80GB", "infer", name, profile, batch, sequence, count,
                    latency_ms=truth.latency_ms(batch, profile, sequence, count) * float(np.exp(noise * rng.normal())))
        for profile in profiles for batch in batches for sequence in sequences for count in processes
    ]  # fmt: skip
