"""Triton kernels without a GPU: modules whose checks run in the interpreter, and modules that compile; each in its own process.

Triton reads the environment when it is imported, so neither can happen in the process of pytest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600


def interpret(module: str) -> dict[str, str | None]:
    """Name of each check of ``module`` (it ends with ``report(CHECKS)``) -> None, or its traceback."""
    return _run(module, {**os.environ, "TRITON_INTERPRET": "1"})


def compile_kernels(module: str, cache: Path) -> dict[str, dict[str, Any]]:
    """What ``module`` says of the code that it compiled, with nothing taken from an older cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return _run(module, {**environment, "TRITON_CACHE_DIR": str(cache)})


def report(checks: Mapping[str, Callable[[], None]]) -> None:
    """Runs all of them and prints what ``interpret`` reads."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("set TRITON_INTERPRET=1")
    torch.set_num_threads(1)
    results: dict[str, str | None] = {}
    for name, check in checks.items():
        try:
            check()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


def _run(module: str, environment: Mapping[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", module], cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
