"""The tiny thread in a worker that makes faults from within: GIL lock, stretched work, skipped and mismatched operations.

Off unless ``SEXTANT_C4_INJECTION`` names the control folder. ``install`` wraps the operations of the recorded process group's
class, so that the user's loop stays as it is; without an active fault a wrapped call costs one attribute read.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.c4.injection.faults import (
    ENVIRONMENT,
    Applied,
    Fault,
    FaultName,
    answer_file,
    control_file,
    read_faults,
    write_applied,
)

logger = logging.getLogger("sextant.c4.injection")

POLL_S = 0.02
OPERATIONS = (
    "allreduce", "broadcast", "reduce", "allgather", "reduce_scatter", "_allgather_base", "_reduce_scatter_base",
    "all_gather_single", "reduce_scatter_single", "all_to_all_single", "alltoall", "alltoall_base",
    "barrier", "gather", "scatter",
)  # fmt: skip
ONE_SHOT = (
    FaultName.SKIPPED_COLLECTIVE,
    FaultName.MISMATCHED_COLLECTIVE,
    FaultName.RAISE_ERROR,
    FaultName.PAUSE,
    FaultName.GC_PAUSE,
)
_hook: Hook | None = None

LastMark = Callable[[], int]
"""CLOCK_MONOTONIC when this process last went over to its own work; 0 when unknown."""


class InjectedError(RuntimeError):
    """What RAISE_ERROR raises in the user's loop."""


def enabled() -> Path | None:
    """The control folder when this process is to listen."""
    folder = os.environ.get(ENVIRONMENT, "")
    return Path(folder) if folder else None


def install_in_worker() -> Hook | None:
    """Listen when the environment asks for it; call it in a worker at any time before or after its groups are made."""
    folder = enabled()
    if folder is None:
        return None
    from actors.c4.recorder.backend import recorder
    from actors.c4.recorder.group import C4Group

    marks: dict[Path, LastMark] = {}

    def mark() -> int:
        current = recorder()
        if current is None or current.path is None:
            return 0
        if current.path not in marks:
            marks[current.path] = ring_mark(current.path)
        return marks[current.path]()

    return install(folder, C4Group, mark)


def install(folder: Path, group_class: type, last_mark: LastMark) -> Hook:
    """Start listening, once a process.

    Args:
        folder: of the control files.
        group_class: the process group's class; its operations are wrapped.
        last_mark: tells when the last operation ended.
    """
    global _hook
    if _hook is None or _hook.pid != os.getpid():
        folder.mkdir(parents=True, exist_ok=True)
        _hook = Hook(folder, last_mark)
        _hook.wrap(group_class)
        _hook.start()
    return _hook


class Hook(threading.Thread):
    """See the module."""

    def __init__(self, folder: Path, last_mark: LastMark):
        super().__init__(name="c4-injection", daemon=True)
        self.pid = os.getpid()
        self.active = False
        """Whether a wrapped operation must look at the faults."""
        self._control = control_file(folder, self.pid)
        self._answer = answer_file(folder, self.pid)
        self._last_mark = last_mark
        self._faults: dict[str, Fault] = {}
        self._done: set[str] = set()
        self._applied: dict[str, Applied] = {}
        self._lock = threading.Lock()
        self._inside = threading.local()

    # ---- the operations' side

    def wrap(self, group_class: type) -> None:
        """Have every operation of the class ask ``before`` first."""
        for name in OPERATIONS:
            original = getattr(group_class, name, None)
            if callable(original) and name in vars(group_class):
                setattr(group_class, name, self._wrapped(name, original))

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def operation(group: Any, *args: Any, **keywords: Any) -> Any:
            if not self.active or getattr(self._inside, "busy", False):
                return original(group, *args, **keywords)
            self._inside.busy = True
            try:
                instead = self._before(group, name, args)
                return instead if instead is not None else original(group, *args, **keywords)
            finally:
                self._inside.busy = False

        return operation

    def _before(self, group: Any, name: str, args: tuple[Any, ...]) -> Any:
        """Apply what waits for an operation; what is returned takes the operation's place."""
        with self._lock:
            faults = [fault for id_, fault in self._faults.items() if id_ not in self._done]
        for fault in faults:
            if fault.name is FaultName.SLOW_COMPUTE:
                mark_ns = self._last_mark()
                if mark_ns:
                    time.sleep(max(0, time.monotonic_ns() - mark_ns) / 1e9 * (fault.factor - 1))
                if fault.id not in self._applied:
                    self._tell(fault)
            elif fault.name in ONE_SHOT and self._take(fault):
                if fault.name is FaultName.PAUSE:
                    time.sleep(fault.duration_s or 0.0)
                elif fault.name is FaultName.GC_PAUSE:
                    hold_gil(fault.duration_s or 0.0)
                elif fault.name is FaultName.RAISE_ERROR:
                    raise InjectedError(f"injected into rank {fault.rank}")
                elif fault.name is FaultName.SKIPPED_COLLECTIVE:
                    return _completed(args)
                elif name != "broadcast" and args:
                    return group.broadcast(_first_tensors(args[0]))
        return None

    def _take(self, fault: Fault) -> bool:
        """Claims a fault that acts once."""
        with self._lock:
            if fault.id in self._done:
                return False
            self._done.add(fault.id)
            self._update()
        self._tell(fault)
        return True

    # ---- the thread's side

    def run(self) -> None:
        # A signal that is handled in this thread would end a sleep that holds the interpreter's lock.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        seen = 0
        while True:
            try:
                changed = self._control.stat().st_mtime_ns if self._control.exists() else 0
                if changed != seen:
                    seen = changed
                    self._take_over(read_faults(self._control))
            except Exception:
                logger.exception("An injected fault could not be applied.")
                time.sleep(1.0)
            time.sleep(POLL_S)

    def _take_over(self, faults: tuple[Fault, ...]) -> None:
        with self._lock:
            new = [fault for fault in faults if fault.id not in self._faults]
            self._faults = {fault.id: fault for fault in faults}
            self._update()
        for fault in new:
            if fault.name is FaultName.GIL_LOCK:
                self._tell(fault)
                hold_gil(fault.duration_s or 86400.0)

    def _update(self) -> None:
        self.active = any(id_ not in self._done and f.name is not FaultName.GIL_LOCK for id_, f in self._faults.items())

    def _tell(self, fault: Fault) -> None:
        with self._lock:
            self._applied[fault.id] = Applied(fault.id, time.monotonic_ns())
            answers = list(self._applied.values())
        write_applied(self._answer, answers)


def ring_mark(ring: Path) -> LastMark:
    """``LastMark`` from the process's own ring (about a millisecond a call)."""
    from actors.c4.recorder.reader import RingReader

    reader = RingReader(ring)

    def mark() -> int:
        operations = reader.read().operations
        return int(max(operations["end_ns"].max(initial=0), operations["enter_ns"].max(initial=0)))

    return mark


def hold_gil(seconds: float) -> None:
    """Sleep in native code without giving the interpreter's lock away, as a bad extension does."""
    libc = ctypes.PyDLL(None)  # PyDLL, unlike CDLL, keeps the lock
    libc.usleep.argtypes = [ctypes.c_uint]
    deadline = time.monotonic() + seconds
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        while (left := deadline - time.monotonic()) > 0:
            libc.usleep(min(int(left * 1e6) + 1, 4_000_000_000))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _first_tensors(tensors: Any) -> list[Any]:
    """One tensor in a list, of whatever an operation takes first: a tensor, a list, or a list of lists."""
    while isinstance(tensors, (list, tuple)):
        tensors = tensors[0]
    return [tensors]


def _completed(args: tuple[Any, ...]) -> Any:
    """A work that is done, for an operation that is left out; its tensors stay as they are."""
    import torch
    from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]

    tensors = args[0] if args else []
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(list(tensors) if isinstance(tensors, (list, tuple)) else [tensors])
    return _create_work_from_future(future)
