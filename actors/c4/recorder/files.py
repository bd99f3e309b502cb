"""Housekeeping around the rings: files of dead workers, and the stack of a living one. No torch, no Ray."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from actors.c4.recorder.errors import RingFormatError
from actors.c4.recorder.layout import default_directory, process_start
from actors.c4.recorder.reader import RingIdentity, RingReader, discover

SIDE_FILES = (".stack", ".links")
"""What stands beside a ring, by ending."""
_MAX_STACK_BYTES = 256 * 1024


def side_file(ring: Path, ending: str) -> Path:
    """``.stack`` or ``.links`` of a ring."""
    return ring.with_suffix(ending)


def clean_stale(directory: Path | None = None, *, keep_s: float = 0.0) -> list[Path]:
    """Remove the files of processes that are gone; a living process's never, a stopped one's neither.

    Args:
        directory: of the rings.
        keep_s: leave what was touched within this time (an agent may still want a dead worker's last records).

    Returns:
        The rings that were removed.
    """
    directory = directory or default_directory()
    removed = []
    for found in discover(directory):
        if _in_use(found.path, found.pid) or _age_s(found.path) < keep_s:
            continue
        for path in (found.path, *(side_file(found.path, ending) for ending in SIDE_FILES)):
            path.unlink(missing_ok=True)
        removed.append(found.path)
    return removed


def dump_stack(ring: Path, identity: RingIdentity, timeout_s: float = 1.0) -> str:
    """Stacks of all threads of a worker, which its faulthandler writes at SIGUSR1: also while something holds its GIL.

    Returns:
        The text, or "" when the process is gone, is stopped, or did not answer in time.
    """
    path = side_file(ring, ".stack")
    if not identity.alive() or not path.exists():
        return ""
    before = path.stat().st_size
    try:
        os.kill(identity.pid, signal.SIGUSR1)
    except (ProcessLookupError, PermissionError):
        return ""
    deadline = time.monotonic() + timeout_s
    size = before
    while time.monotonic() < deadline:
        time.sleep(0.01)
        now = path.stat().st_size
        if now > before and now == size:  # it has stopped growing
            break
        size = now
    with path.open("rb") as file:
        file.seek(before)
        return file.read(_MAX_STACK_BYTES).decode(errors="replace")


def _in_use(path: Path, pid: int) -> bool:
    start = process_start(pid)
    if not start:
        return False
    try:
        with RingReader(path) as reader:
            return reader.identity.process_start == start
    except RingFormatError:
        return True  # not ours to judge while a process of that number lives
    except OSError:
        return False


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
