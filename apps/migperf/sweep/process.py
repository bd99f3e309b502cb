"""A trial's process seen from outside: started, put into its slice, asked for windows, ended. What it dies of is a result."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apps.migperf.sweep.loops import Window
from apps.migperf.sweep.trial import TrialPoint

REPOSITORY = Path(__file__).resolve().parents[3]
START_TIMEOUT_S = 300.0
ANSWER_SLACK_S = 120.0


class TrialEnded(Exception):
    """The process cannot go on: ``status`` is ``oom`` or ``failed``, the text says why."""

    def __init__(self, status: str, why: str):
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class WorkerSettings:
    """How the worker computes. ``threads``: of torch on a CPU without a slice (None: torch's own choice)."""

    dtype: str = "float32"
    cuda: bool = False
    threads: int | None = None


class TrialProcess:
    """Use it as a context manager. ``lease(pid)`` gives the environment of the slice (an empty one: no slice)."""

    def __init__(
        self,
        point: TrialPoint,
        lease: Callable[[int], Mapping[str, str]],
        settings: WorkerSettings = WorkerSettings(),
    ):
        """Starts the process; ``wait_ready`` waits for it.

        Raises:
            BackendError: no lease; the process is ended.
        """
        self.point = point
        self.start_s = 0.0
        self.memory_mib: float | None = None
        self._began = time.monotonic()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "apps.migperf.sweep.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self._pending = b""
        try:
            environment = dict(lease(self._process.pid))
            self._tell({"environment": environment, "point": asdict(point), **asdict(settings)})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TrialProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        """Model built and warm. Raises TrialEnded."""
        self._answer("ready", START_TIMEOUT_S)
        self.start_s = time.monotonic() - self._began

    def begin(self, seconds: float, seed: int = 0) -> None:
        """Starts a window; ``finish`` waits for it. So several processes measure at once."""
        self._window_s = seconds
        self._tell({"measure_s": seconds, "seed": seed})

    def finish(self) -> Window:
        """The window that was begun. Raises TrialEnded."""
        return self._window(self._answer("window", 10 * self._window_s + ANSWER_SLACK_S))

    def measure(self, seconds: float, seed: int = 0) -> Window:
        """One window. Raises TrialEnded."""
        self.begin(seconds, seed)
        return self.finish()

    def tell_steps(self, steps: int) -> None:
        """Starts exactly so many batches; ``poll`` or ``finish_steps`` gets their window."""
        self._tell({"steps": steps})

    def finish_steps(self, timeout_s: float = ANSWER_SLACK_S) -> Window:
        """Raises TrialEnded."""
        return self._window(self._answer("window", timeout_s))

    @property
    def answer_file(self) -> int:
        """Readable when an answer (or the end) is there: for an event loop."""
        return self._process.stdout.fileno()  # type: ignore[union-attr]

    def close(self) -> None:
        """Ends the process, stopped or not, and waits for its end."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        self._process.stdout.close()  # type: ignore[union-attr]
        self._stderr.close()

    # ---- the inside

    def _window(self, found: dict[str, Any]) -> Window:
        self.memory_mib = found["memory_mib"]
        return Window(tuple(found["latencies_ms"]), found["seconds"], found["dropped"])

    def _tell(self, command: dict[str, Any]) -> None:
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
        except OSError:
            # The answer (or the exit code) that is already there says why.
            self._answer("ready", 5.0)
            raise TrialEnded("failed", "The process no longer listens.") from None

    def _answer(self, wanted: str, timeout_s: float) -> dict[str, Any]:
        line = self._line(timeout_s)
        if line is None:
            raise self._died()
        answer = json.loads(line)
        for status in ("oom", "failed"):
            if status in answer:
                raise TrialEnded(status, answer[status])
        return answer[wanted]

    def _line(self, timeout_s: float) -> bytes | None:
        """The next line; None at the end of the stream."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.answer_file], [], [], left)[0]:
                raise TrialEnded("failed", f"No answer within {timeout_s:.0f} s.")
            data = os.read(self.answer_file, 1 << 20)
            if not data:
                return None
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _died(self) -> TrialEnded:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        last = lines[-1][:300] if lines else ""
        if code == -signal.SIGKILL:
            return TrialEnded(
                "oom", "The process was killed (SIGKILL): the machine's memory ran out, or someone ended it."
            )
        if "MemoryError" in last or "annot allocate memory" in last:
            return TrialEnded("oom", last)
        return TrialEnded("failed", f"The process ended with code {code}{': ' + last if last else ''}.")
