"""Compiles the C++ kernels once and loads them: the only place that knows a compiler. ``python -m kernels.build`` compiles all.

A folder ``kernels/<op>/csrc`` with ``*.cpp`` files is the extension ``<op>``; its ops appear under ``torch.ops.sextant``. A
library lies in the user's cache folder (``SEXTANT_CACHE`` overrides) under a key of its sources, the headers that they
include, flags, torch and compiler, so that nothing is ever rebuilt in vain or loaded stale. No ``-march``: each kernel chooses
its instruction set when it runs, so one library serves a mixed cluster, and a node without a compiler that shares the cache.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
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
    """Path of the compiled library, compiled now if it is not there. BuildError says why it cannot be."""
    if sys.platform != "linux":
        raise BuildError(f"the C++ kernels are built on Linux only, this is {sys.platform}")
    sources = sorted((ROOT / name / "csrc").glob("*.cpp"))
    folder, key, command = cache_folder(), _key(sources), compiler()
    if command is None:
        # Compiled elsewhere from the same sources: which compiler it was does not matter then.
        found = max(folder.glob(f"{name}-{key}-*.so"), key=lambda path: path.stat().st_mtime, default=None)
        if found is None:
            raise BuildError(f"there is no C++ compiler; {INSTALL_HINT}")
        return found
    path = folder / f"{name}-{key}-{_digest([_compiler_version(command).encode()])[:8]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(command, sources, path)
    return path


def _compile(command: str, sources: list[Path], path: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

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
def _compiler_version(command: str) -> str:
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout.split("\n", 1)[0]


def _with_headers(sources: list[Path]) -> list[Path]:
    """The sources and all our headers that they reach, by the names in quotes (a kernel may include another's header)."""
    found, todo = set(sources), list(sources)
    while todo:
        path = todo.pop()
        for quoted in re.findall(r'"([\w./]+\.h)"', path.read_text()):
            for header in (path.parent / quoted, ROOT / quoted):
                if header.is_file() and header.resolve() not in found:
                    found.add(header.resolve())
                    todo.append(header.resolve())
    return sorted(found)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _key(sources: list[Path]) -> str:
    facts = repr((torch.__version__, platform.machine(), COMPILE_FLAGS)).encode()
    files = [part for path in _with_headers(sources) for part in (path.name.encode(), path.read_bytes())]
    return _digest([facts, *files])[:20]


def main() -> int:
    """Compile all, as many at once as there are cores; 0 also without a compiler, because torch code then runs instead."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    every = names()

    def build(name: str) -> tuple[str, float, str | None]:
        start = time.monotonic()
        try:
            _library(name)
        except (BuildError, OSError) as error:
            return name, time.monotonic() - start, str(error)
        return name, time.monotonic() - start, None

    print(f"{len(every)} C++ kernels (the first time this takes about a minute): {', '.join(every)}", flush=True)
    missing, problems = [], set()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for number, future in enumerate(as_completed([pool.submit(build, name) for name in every]), start=1):
            name, seconds, problem = future.result()
            ready = problem is None and load(name)  # load warns of a library that does not fit this machine
            print(
                f"  {number}/{len(every)} {name}: {f'ready, {seconds:.1f} s' if ready else 'not available'}", flush=True
            )
            if problem is not None and problem not in problems:  # the same for all when there is no compiler
                print(f"      {problem}", flush=True)
            problems.add(problem)
            missing += [] if ready else [name]
    if missing:
        print(f"Without {', '.join(sorted(missing))} slower torch code runs, which is not bit-exact across batches.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
