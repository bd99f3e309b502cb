"""Stacks of a stuck worker: py-spy from outside, else the faulthandler that the worker registered for SIGUSR1. No Ray.

py-spy reads another process's memory (the same user, ptrace permitted) and works on stopped and GIL-locked processes;
faulthandler works under a GIL lock, not under SIGSTOP.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from actors.c4.recorder.files import dump_stack
from actors.c4.recorder.reader import RingIdentity

PY_SPY_TIMEOUT_S = 5.0
MAX_CHARACTERS = 20_000


def take(pid: int, ring: Path | None = None, identity: RingIdentity | None = None) -> str:
    """Stacks of all threads as text; a sentence in brackets that says why there are none. Takes seconds at worst.

    ``ring`` and ``identity``: of the worker's ring, beside which its faulthandler writes.
    """
    text, why = _py_spy(pid)
    if not text and ring is not None and identity is not None:
        text = dump_stack(ring, identity)
        why = f"{why}; its faulthandler did not answer (a stopped process cannot)"
    return text[:MAX_CHARACTERS] if text else f"[no stacks of process {pid}: {why}]"


def py_spy_path() -> str | None:
    """The binary beside this Python, else on PATH."""
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.is_file() else shutil.which("py-spy")


def _py_spy(pid: int) -> tuple[str, str]:
    binary = py_spy_path()
    if binary is None:
        return "", "py-spy is not installed"
    command = [binary, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PY_SPY_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return "", f"py-spy took over {PY_SPY_TIMEOUT_S:g} s"
    except OSError as error:
        return "", f"py-spy could not be started ({error.strerror})"
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        return "", f"py-spy failed ({next((line for line in lines if line.startswith('Error')), lines[0])})"
    return done.stdout, ""
