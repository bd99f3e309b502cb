"""Power and energy: a board has one meter, a slice has none. So the board's energy is divided, and the division has an error.

Of every interval between two samples, the part that an idle board draws too is divided by SMs (what no slice holds stays
unattributed), the rest by the work done: SMs times activity. The sum over slices and the unattributed part is held against
the board's own energy counter: that ratio is the error which stands beside every number.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One look at the board. ``activity``: of each slice (0 to 1) where it can be read, by the slice's name."""

    at_s: float
    power_w: float
    activity: Mapping[str, float]
    counter_j: float | None = None
    """The board's energy counter."""


@dataclass(frozen=True)
class Attribution:
    """Energy in joules over the samples' time."""

    slices_j: Mapping[str, float]
    unattributed_j: float
    board_j: float
    error: float | None
    """|sum of the parts - counter| / counter; None without a counter."""
    seconds: float


def attribute(samples: Sequence[Sample], shares: Mapping[str, float], idle_w: float) -> Attribution | None:
    """Divides the board's energy among slices; None for fewer than two samples.

    Args:
        shares: each slice's share of the board's SMs, in sum at most 1.
        idle_w: what the board draws when nothing runs on it.

    Raises:
        ValueError: shares that are negative or more than the whole.
    """
    if sum(shares.values()) > 1 + 1e-9 or any(share < 0 for share in shares.values()):
        raise ValueError(f"Shares of the board must be between 0 and 1 in sum, not {dict(shares)}.")
    if len(samples) < 2:
        return None
    parts, rest = dict.fromkeys(shares, 0.0), 0.0
    for before, after in itertools.pairwise(samples):
        seconds = after.at_s - before.at_s
        power = (before.power_w + after.power_w) / 2
        still = min(idle_w, power)
        work = {
            name: share * (before.activity.get(name, 0.0) + after.activity.get(name, 0.0)) / 2
            for name, share in shares.items()
        }
        done = sum(work.values())
        for name, share in shares.items():
            parts[name] += seconds * still * share
            if done > 0:
                parts[name] += seconds * (power - still) * work[name] / done
        rest += seconds * still * (1 - sum(shares.values())) + (0.0 if done > 0 else seconds * (power - still))
    total = sum(parts.values()) + rest
    first, last = samples[0], samples[-1]
    counter = None if first.counter_j is None or last.counter_j is None else last.counter_j - first.counter_j
    error = abs(total - counter) / counter if counter else None
    return Attribution(parts, rest, counter or total, error, last.at_s - first.at_s)


class PowerMeter:
    """Samples a board through NVML in a thread. Where there is no NVML, ``stop`` returns no samples and ``why`` says so."""

    def __init__(
        self,
        gpu: int = 0,
        activity: Callable[[], Mapping[str, float]] = dict,
        interval_s: float = 0.05,
        module: Any = None,
    ):
        """``module``: a double of pynvml in tests. ``activity``: of each slice now."""
        self.why = ""
        self._gpu, self._activity, self._interval = gpu, activity, interval_s
        self._samples: list[Sample] = []
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        if module is None:
            try:
                import pynvml as module
            except ImportError:
                self.why = "The package nvidia-ml-py is not installed."
        self._module = module

    def start(self) -> PowerMeter:
        if self._module is None:
            return self
        try:
            self._module.nvmlInit()
        except self._module.NVMLError as error:
            self.why = f"NVML does not start: {error}."
            return self
        self._thread = threading.Thread(target=self._run, name="power meter", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> list[Sample]:
        """The samples; whatever ended the thread early is in ``why``."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            with contextlib.suppress(self._module.NVMLError):
                self._module.nvmlShutdown()
        return self._samples

    def idle_w(self) -> float:
        """Power now; to be asked when nothing runs. 0 where it cannot be read."""
        if self._module is None:
            return 0.0
        try:
            self._module.nvmlInit()
            try:
                return self._read(self._module.nvmlDeviceGetHandleByIndex(self._gpu)).power_w
            finally:
                self._module.nvmlShutdown()
        except self._module.NVMLError as error:
            self.why = f"The board's power cannot be read: {error}."
            return 0.0

    def _run(self) -> None:
        try:
            device = self._module.nvmlDeviceGetHandleByIndex(self._gpu)
            while True:
                ending = self._ending.wait(self._interval if self._samples else 0)
                self._samples.append(self._read(device))
                if ending:
                    return
        except Exception as error:
            self.why = f"Sampling the board's power ended: {error}."

    def _read(self, device: Any) -> Sample:
        nvml = self._module
        power = nvml.nvmlDeviceGetPowerUsage(device) / 1e3
        try:
            counter: float | None = nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3
        except nvml.NVMLError:
            counter = None
        activity = dict(self._activity())
        if not activity:
            with contextlib.suppress(nvml.NVMLError):
                activity = {"": nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100}
        return Sample(time.monotonic(), power, activity, counter)
