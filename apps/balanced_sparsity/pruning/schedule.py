"""How the sparsity rises while a network is trained on: gradual schedules, pure functions of the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Rise = Literal["cubic", "linear", "paper"]


@dataclass(frozen=True)
class GradualSchedule:
    """Sparsity 0 before ``start_step``, ``initial`` there, risen to ``final`` at ``end_step`` in rises ``every`` so many steps.

    With t from 0 to 1 between start and end, and density d = 1 - sparsity:

    - ``cubic``: final + (initial - final) (1 - t)^3 (Zhu & Gupta, 2017, eq. 1);
    - ``linear``: initial + (final - initial) t;
    - ``paper``: d_initial (d_final / d_initial)^t: every rise drops the same share of what is left, so that the increments of
      the percentage decrease, as Balanced Sparsity (Yao et al., 2019) has it; its own sequence of percentages is not known.

    Raises ValueError for bounds out of order.
    """

    initial: float
    final: float
    start_step: int
    end_step: int
    every: int = 1
    kind: Rise = "cubic"

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.final < 1:
            raise ValueError(f"sparsity rises from 0 to below 1, not from {self.initial} to {self.final}")
        if not 0 <= self.start_step <= self.end_step:
            raise ValueError(
                f"a schedule goes from step 0 on and forwards, not from {self.start_step} to {self.end_step}"
            )
        if self.every < 1:
            raise ValueError(f"rises are at least 1 step apart, not {self.every}")
        if self.kind not in get_args(Rise):
            raise ValueError(f"a schedule is one of {', '.join(get_args(Rise))}, not {self.kind!r}")

    def sparsity(self, step: int) -> float:
        """After so many optimizer steps; constant between two rises, exactly ``final`` from ``end_step`` on."""
        if step < self.start_step:
            return 0.0
        if step >= self.end_step:
            return self.final
        t = (step - self.start_step) // self.every * self.every / (self.end_step - self.start_step)
        if self.kind == "linear":
            return self.initial + (self.final - self.initial) * t
        if self.kind == "cubic":
            return self.final + (self.initial - self.final) * (1 - t) ** 3
        return 1 - (1 - self.initial) * ((1 - self.final) / (1 - self.initial)) ** t
