"""Processes of this host as /proc tells: state, start, processor time; and a kill that never hits a later process. No Ray.

A process is known by its number and its start in clock ticks since boot (proc_pid_stat(5), field 22): numbers come back.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from actors.c4.diagnosis.observation import ProcessState

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_STATES = {
    "R": ProcessState.RUNNING,
    "S": ProcessState.SLEEPING,
    "D": ProcessState.SLEEPING,
    "I": ProcessState.SLEEPING,
    "T": ProcessState.STOPPED,
    "t": ProcessState.STOPPED,
    "Z": ProcessState.GONE,
    "X": ProcessState.GONE,
}


@dataclass(frozen=True)
class ProcessFacts:
    """One look at a process."""

    state: ProcessState
    started_ticks: int
    cpu_s: float
    """User and system time of all its threads."""


def look(pid: int) -> ProcessFacts | None:
    """What /proc says; None when there is no such process (a zombie is there, and GONE)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before it may hold anything
    cpu_s = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return ProcessFacts(_STATES.get(fields[0], ProcessState.UNKNOWN), int(fields[19]), cpu_s)


class ThreadDelay:
    """How long a thread of a process waits for a processor when it has something to do: Linux' scheduler statistics of a thread
    that mostly sleeps (/proc/PID/task/TID/schedstat: time on a processor, time runnable without one, number of turns)."""

    def __init__(self, pid: int, name: str, every_s: float = 1.0):
        """``name``: of the thread, as /proc/PID/task/TID/comm has it; ``every_s``: over how long the mean is taken."""
        self._pid, self._name, self._every_s = pid, name, every_s
        self._task: Path | None = None
        self._searched_s = -math.inf
        self._mark: tuple[float, int, int] | None = None
        self._turns: tuple[float, int] | None = None
        self._mean_s = math.nan

    def look(self, now_s: float) -> float:
        """Mean seconds per turn lately, or how long it has been waiting now if that is longer; nan when unknown."""
        if self._task is None:
            self._task = self._find(now_s)
        if self._task is None:
            return math.nan
        try:
            text = (self._task / "schedstat").read_text().split()
            stat = (self._task / "stat").read_text()
            delay_ns, turns = int(text[1]), int(text[2])
        except (OSError, ValueError, IndexError):
            self._task = None
            return math.nan
        if self._mark is None or turns < self._mark[2]:
            self._mark = (now_s, delay_ns, turns)
        elif now_s - self._mark[0] >= self._every_s and turns > self._mark[2]:
            self._mean_s = (delay_ns - self._mark[1]) / (turns - self._mark[2]) / 1e9
            self._mark = (now_s, delay_ns, turns)
        runnable = stat[stat.rindex(")") + 2] == "R"
        if not runnable or self._turns is None or self._turns[1] != turns:
            self._turns = (now_s, turns) if runnable else None
        waiting_s = now_s - self._turns[0] if self._turns is not None else 0.0
        return max(waiting_s, self._mean_s) if not math.isnan(self._mean_s) else (waiting_s or math.nan)

    def _find(self, now_s: float) -> Path | None:
        if now_s - self._searched_s < 2.0:
            return None
        self._searched_s = now_s
        for task in Path(f"/proc/{self._pid}/task").glob("*"):
            with contextlib.suppress(OSError):
                if (task / "comm").read_text().strip() == self._name:
                    return task
        return None


def state_of(pid: int, started_ticks: int) -> ProcessState:
    """GONE too when another process bears the number now; ``started_ticks`` -1 takes whoever bears it."""
    facts = look(pid)
    if facts is None or started_ticks not in (-1, facts.started_ticks):
        return ProcessState.GONE
    return facts.state


def kill(pid: int, started_ticks: int, signal_number: int = signal.SIGKILL) -> bool:
    """Send a signal to exactly this process; False when it has ended (or another bears its number).

    The handle is taken before the identity is checked, so the number cannot change hands in between.
    """
    try:
        handle = os.pidfd_open(pid)
    except (ProcessLookupError, OSError):
        return False
    try:
        facts = look(pid)
        if facts is None or facts.started_ticks != started_ticks or facts.state is ProcessState.GONE:
            return False
        signal.pidfd_send_signal(handle, signal_number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def wait_gone(pid: int, started_ticks: int, timeout_s: float) -> bool:
    """Whether it has ended within the time."""
    deadline = time.monotonic() + timeout_s
    while state_of(pid, started_ticks) is not ProcessState.GONE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
