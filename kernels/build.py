"""Compiles the C++ kernels once and loads them: the only place that knows a compiler. ``python -m kernels.build`` compiles all.

A folder ``kernels/<op>/csrc`` with ``*.cpp`` files is the extension ``<op>``; its ops appear under ``torch.ops.sextant``. A
library lies in the user's cache folder (``SEXTANT_CACHE`` overrides) under a key of sources, headers, flags, torch and
compiler, so that nothing is ever rebuilt in vain or loaded stale. No ``-march``: each kernel chooses its instruction set
when it runs, so one library serves a mixed cluster.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from platformdirs import user_cache_dir

logger = logging.getLogger("sextant.kernels")

ROOT = Path(__file__).parent
# -ffp-contract=off: a multiply and an add are fused only where a kernel says so, and so the same on every instruction set.
COMPILE_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wno-psabi",
    "-Wno-attributes",
)
INSTALL_HINT = "install a C++ compiler (Debian, Ubuntu: apt install g++) and run `python -m kernels.build`"


class BuildError(RuntimeError):
    """A kernel did not compile; the message holds the compiler's first lines."""


def names() -> list[str]:
    """Every extension there is: the folders with C++ sources."""
    return sorted({path.parent.parent.name for path in ROOT.glob("*/csrc/*.cpp")})


def compiler() -> str | None:
    """The C++ compiler: ``CXX`` or c++, g++, clang++ on the PATH; None when there is none."""
    for candidate in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if candidate and (found := shutil.which(candidate)):
            return found
    return None


@functools.cache
def load(name: str) -> bool:
    """Make extension ``name`` available under ``torch.ops.sextant``, compiling it if need be; False when it cannot be.

    The reason is logged once as a warning. Safe from several processes at once: one compiles, the others wait.
    """
    if name not in names():
        raise ValueError(f"there is no kernel {name!r}; there are {', '.join(names())}")
    try:
        torch.ops.load_library(str(_library(name)))
    except (BuildError, OSError) as error:
        logger.warning("The C++ kernel %s is not available, slower torch code runs instead: %s", name, error)
        return False
    return True


def available() -> bool:
    """Whether every C++ kernel can be loaded here."""
    return not [name for name in names() if not load(name)]


def cache_folder() -> Path:
    """Where compiled libraries lie."""
    return Path(os.environ.get("SEXTANT_CACHE") or user_cache_dir("sextant")) / "kernels"


def _library(name: str) -> Path:
    """Path of the compiled library, compiled now if it is not there."""
    if sys.platform != "linux":
        raise BuildError(f"the C++ kernels are built on Linux only, this is {sys.platform}")
    sources = sorted((ROOT / name / "csrc").glob("*.cpp"))
    path = cache_folder() / f"{name}-{_key(sources)}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(sources, path)
    return path


def _compile(sources: list[Path], path: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    command = compiler()
    if command is None:
        raise BuildError(f"there is no C++ compiler; {INSTALL_HINT}")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        arguments = [command, *COMPILE_FLAGS, *_defines(), f"-I{ROOT}"]
        arguments += [f"-isystem{include}" for include in (*include_paths(), sysconfig.get_paths()["include"])]
        arguments += ["-shared", *map(str, sources), "-o", str(built)]
        arguments += [flag for where in library_paths() for flag in (f"-L{where}", f"-Wl,-rpath,{where}")]
        arguments += ["-lc10", "-ltorch", "-ltorch_cpu"]
        logger.info("compiling %s", path.name)
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            first = "\n".join(done.stderr.splitlines()[:12])
            raise BuildError(f"{command} failed with code {done.returncode}:\n{first}")
        built.replace(path)  # atomic: no process ever sees half a library


def _defines() -> list[str]:
    return [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]


@functools.cache
def _compiler_version(command: str | None) -> str:
    if command is None:
        return "none"
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout.split("\n", 1)[0]


@functools.cache
def _headers_digest() -> bytes:
    digest = hashlib.sha256()
    for path in sorted(ROOT.glob("*/csrc/*.h")):  # a kernel may include another's header
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.digest()


def _key(sources: list[Path]) -> str:
    digest = hashlib.sha256(_headers_digest())
    for path in sources:
        digest.update(path.name.encode() + path.read_bytes())
    facts = (torch.__version__, platform.machine(), _compiler_version(compiler()), COMPILE_FLAGS)
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:20]


def main() -> int:
    """Compile all; 0 also without a compiler, because torch code then runs instead."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    failed = []
    for number, name in enumerate(names(), start=1):
        print(f"kernel {number}/{len(names())}: {name} ... ", end="", flush=True)
        print("ready" if load(name) else "not available", flush=True)
        failed += [] if load(name) else [name]
    if failed:
        print(f"Without {', '.join(failed)} slower torch code runs, not bit-exact across batches; {INSTALL_HINT}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
