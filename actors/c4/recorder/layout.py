"""Where things lie in a worker's ring file, how the file is called, and which process it belongs to. No torch, no Ray.

    <run>.g<generation>.r<rank>.p<pid>.ring     header | communicator table | operations | edges
                                      .stack    what faulthandler writes at SIGUSR1
                                      .links    a word per destination rank, by which another process slows a link

The file stands in a folder of shared memory, so that it survives its worker in any state, and a reader needs no help from it.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actors.c4.recorder.errors import RecorderError
from actors.c4.recorder.records import EDGE_RECORD, OP_RECORD

MAGIC = b"SXTC4RNG"
VERSION = 1
HEADER_BYTES = 512
RUN_BYTES = 128
DIRECTORY_VARIABLE = "SEXTANT_C4_DIR"

HEADER = np.dtype(
    {
        "names": [
            "magic", "version", "header_bytes", "run", "hostname", "generation", "rank", "world_size", "pid", "process_start",
            "op_capacity", "edge_capacity", "table_capacity", "table_used", "heartbeat_ns", "newest_op", "closed",
        ],
        "formats": [
            "S8", "<u4", "<u4", f"S{RUN_BYTES}", "S64", "<i8", "<i4", "<i4", "<i8", "<i8",
            "<i8", "<i8", "<i8", "<i8", "<i8", "<i8", "<i8",
        ],
        "offsets": [0, 8, 12, 16, 144, 208, 216, 220, 224, 232, 240, 248, 256, 264, 272, 280, 288],
        "itemsize": HEADER_BYTES,
    }
)  # fmt: skip
"""``table_used``: bytes of the table that are written. ``newest_op``: highest op_id entered. ``closed``: CLOCK_MONOTONIC of an
orderly end, 0 while the worker records. ``process_start``: field 22 of /proc/PID/stat, so that a reused pid is told apart."""


@dataclass(frozen=True)
class Sizes:
    """Offsets in bytes of the file's parts."""

    op_capacity: int
    edge_capacity: int
    table_capacity: int

    @property
    def table(self) -> int:
        return HEADER_BYTES

    @property
    def operations(self) -> int:
        return self.table + self.table_capacity

    @property
    def edges(self) -> int:
        return self.operations + self.op_capacity * OP_RECORD.itemsize

    @property
    def total(self) -> int:
        return self.edges + self.edge_capacity * EDGE_RECORD.itemsize


@dataclass(frozen=True)
class Communicator:
    """A row of the table: a process group as the worker knows it. Its index is its place in the table."""

    name: str
    """Unique in the run, equal on all its ranks. Point-to-point traffic has tables rows of its own, ``<group>/<a>-><b>``, because
    its operations are not numbered alike on all ranks of the group: the n-th SEND there answers the n-th RECV."""
    role: str
    """"dp", "tp", "pp", "ep", or "" when unknown."""
    ranks: tuple[int, ...]
    """Global ranks in ring order."""


@dataclass(frozen=True)
class RingName:
    """What the name of a ring file says."""

    run: str
    """As it stands in the name: characters that a file name should not hold are replaced by "_"."""
    generation: int
    rank: int
    pid: int
    path: Path


_NAME = re.compile(r"^(?P<run>.*)\.g(?P<generation>\d+)\.r(?P<rank>\d+)\.p(?P<pid>\d+)\.ring$")


def default_directory() -> Path:
    """``SEXTANT_C4_DIR``, or a folder of this user in shared memory (of the temporary folder where there is no /dev/shm)."""
    if chosen := os.environ.get(DIRECTORY_VARIABLE):
        return Path(chosen)
    shared = Path("/dev/shm")
    if not shared.is_dir():
        import tempfile

        shared = Path(tempfile.gettempdir())
    return shared / f"sextant-c4-{os.getuid()}"


def make_directory(directory: Path) -> None:
    """Make the folder, for this user only.

    Raises:
        RecorderError: it cannot be made, or belongs to somebody else (who could then feed us faults or read our stacks).
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except OSError as error:
        raise RecorderError(f"The folder of the rings, {directory}, cannot be made: {error.strerror}.") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise RecorderError(
            f"The folder of the rings, {directory}, belongs to another user; set {DIRECTORY_VARIABLE} to one of your own."
        )


def file_run(run: str) -> str:
    """A run's name as it stands in file names."""
    return re.sub(r"[^A-Za-z0-9_\-]", "_", run)[:80]


def ring_path(directory: Path, run: str, generation: int, rank: int, pid: int) -> Path:
    """Path of a worker's ring."""
    return directory / f"{file_run(run)}.g{generation}.r{rank}.p{pid}.ring"


def parse_name(path: Path) -> RingName | None:
    """What a file's name says; None when it is no ring's."""
    found = _NAME.match(path.name)
    if found is None:
        return None
    return RingName(found["run"], int(found["generation"]), int(found["rank"]), int(found["pid"]), path)


def process_start(pid: int) -> int:
    """When the process began, in clock ticks since boot; 0 when there is none (or it is a zombie) or no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] in ("Z", "X") else int(fields[19])
