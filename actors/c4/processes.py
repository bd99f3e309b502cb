"""Processes of this host as /proc tells: state, start, processor time; and a kill that never hits a later process. No Ray.

A process is known by its number and its start in clock ticks since boot (proc_pid_stat(5), field 22): numbers come back.
"""

from __future__ import annotations

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
