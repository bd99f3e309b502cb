"""The duration of a training step, read off a rank's own operations: they repeat with the step. For the agent."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LONGEST = 256
"""Operations in a step beyond which the repetition is not looked for."""
NEWEST = 48
"""Operations over which the repetition must hold at least."""
GAP_FACTOR = 4.0
"""A pause this many times the median between two like operations parts two steps ..."""
REGULAR = 0.75
"""... when this share of the pauses is equally many operations apart."""


def step_period(enter_ns: NDArray[np.int64], signature: NDArray[np.int64]) -> float:
    """Median seconds from one step to the next; nan when nothing repeats yet.

    Args:
        enter_ns: [N], when the newest operations of a rank were entered, ascending.
        signature: [N], an integer for what each was (communicator, type, dtype, bytes).

    The smallest p for which the operations equal those p before them (all that are given, all but the first, or the newest) is
    the number of operations in a step. Operations that all look alike hide it: then the longest regular pauses between them part
    the steps.
    """
    count = len(enter_ns)
    if count < 4 or count != len(signature):
        return float("nan")
    times = np.asarray(enter_ns, dtype=np.float64) / 1e9
    # First by all that is known, then without what a job does once as it starts.
    for skipped in (0, count // 8, count // 4):
        for period in range(1, min(LONGEST, (count - skipped) // 3) + 1):
            if (signature[skipped + period :] == signature[skipped : count - period]).all():
                return _lap(times[skipped:], period)
    # Where something else came between (an evaluation), by the newest operations.
    for period in range(1, min(LONGEST, count // 3) + 1):
        span = min(count - period, max(2 * period, NEWEST))
        if (signature[count - span :] == signature[count - span - period : count - period]).all():
            return _lap(times[count - span - period :], period)
    return float("nan")


def _lap(times: NDArray[np.float64], period: int) -> float:
    laps = times[period:] - times[:-period]
    if period > 1:
        return float(np.median(laps))
    # All alike: one operation a step, or several equal ones with the step's own work between the last and the first.
    median = float(np.median(laps))
    breaks = np.flatnonzero(laps > GAP_FACTOR * median)
    apart = np.diff(breaks)
    # Steps that something held up are pauses, too, but not every so many operations.
    if len(breaks) < 3 or (apart == np.median(apart)).mean() < REGULAR:
        return median
    return float(np.median(np.diff(times[breaks])))
