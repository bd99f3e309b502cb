"""Compiles a CUDA source of ``kernels/balanced/gpu/csrc`` for the CPU, over ``emulated.h``: a library like nvcc's."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

from kernels import build
from kernels.balanced.gpu import compiled

HERE = Path(__file__).parent


def emulated(request: compiled.Request, folder: Path) -> ctypes.CDLL:
    """The launcher of ``request`` on CPU memory."""
    compiler = build.compiler()
    assert compiler is not None
    path = folder / f"{abs(hash(request))}.so"
    if path.exists():
        return _loaded(path)
    source = compiled.CSRC / f"{request.source}.cu"
    flags = ["-x", "c++", "-std=c++20", "-O0", "-shared", "-fPIC", "-DSEXTANT_EMULATED"]
    command = [compiler, *flags, f"-I{HERE}", f"-I{compiled.CSRC}", *request.defines, str(source), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return _loaded(path)


def _loaded(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.sextant_launch.argtypes = compiled.ARGUMENTS
    return loaded
