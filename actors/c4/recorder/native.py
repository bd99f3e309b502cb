"""The compiled engine (csrc/ring.cpp): operations run without Python's lock, so a busy interpreter slows no ring. No Ray.

Compiled once with the compiler of ``kernels.build`` into its cache folder; without one, a warning says so and engine.py runs.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from actors.c4.recorder.engine import Job
from actors.c4.recorder.failing import WITNESS_S, Failure
from actors.c4.recorder.records import ElementType
from actors.c4.recorder.ring import EdgeSlot
from actors.c4.recorder.transport import RingTransport
from actors.c4.recorder.wire import ABORT_BYTES, ANNOUNCEMENT, Announcement

logger = logging.getLogger("sextant.c4.recorder")

_SOURCE = Path(__file__).parent / "csrc" / "ring.cpp"
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-ffp-contract=off", "-shared")
_DONE, _MISMATCH, _LOST_PREDECESSOR, _LOST_SUCCESSOR, _TOLD, _TIMEOUT, _PROTOCOL, _INTERRUPTED = range(8)


class _Job(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ("out_fd", "in_fd", "rank", "size", "element_type", "average", "piece_count")
        ),
        ("reserved", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("receives", "sends", "begun_ns", "deadline_ns", "pacing")),
        *((name, ctypes.c_void_p) for name in ("data", "pieces", "out_edge", "in_edge", "control")),
        ("announcement", ctypes.c_uint8 * ANNOUNCEMENT.size),
    )


class _Outcome(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("error", "announced")),
        *((name, ctypes.c_int64) for name in ("awaited", "unsent")),
        *((name, ctypes.c_void_p) for name in ("rest_head", "rest_body")),
        *((name, ctypes.c_int64) for name in ("rest_head_bytes", "rest_body_bytes")),
        *((name, ctypes.c_int32) for name in ("text_bytes", "reserved")),
        ("announcement", ctypes.c_uint8 * ANNOUNCEMENT.size),
        ("text", ctypes.c_uint8 * ABORT_BYTES),
    )


class NativeEngine:
    """Job after job over one transport; the same behaviour as ``PythonEngine``."""

    def __init__(self, transport: RingTransport, library: ctypes.CDLL, ring_address: int):
        """``ring_address``: of the mapped ring, whose edge records the compiled code updates."""
        self.transport, self._library, self._base = transport, library, ring_address
        self._ring = ctypes.c_void_p(library.c4_ring_new())
        self._control = transport.control_address()
        self._out = _Outcome()

    def __del__(self) -> None:
        self._library.c4_ring_delete(self._ring)

    def run(self, job: Job, outgoing: EdgeSlot, incoming: EdgeSlot, timeout_s: float) -> None:
        """Run it to its end. Raises CollectiveError as ``PythonEngine.run``."""
        transport, plan = self.transport, job.plan
        begun = time.monotonic_ns()
        packed = job.announcement.pack()
        order = _Job(
            transport.outgoing.fileno(), transport.incoming.fileno(), transport.rank, transport.size,
            job.announcement.element_type, job.average, len(plan.pieces), 0,
            plan.receives, plan.sends, begun, begun + int(timeout_s * 1e9), transport.pacing,
            job.address, plan.pieces.ctypes.data, self._base + outgoing.offset, self._base + incoming.offset, self._control,
            (ctypes.c_uint8 * len(packed)).from_buffer_copy(packed),
        )  # fmt: skip
        library, out = self._library, self._out
        library.c4_ring_begin(self._ring, ctypes.byref(order), ctypes.byref(out))
        graced = False
        # Between two turns Python runs its signal handlers.
        while (status := library.c4_ring_run(self._ring)) != _DONE:
            if status == _INTERRUPTED:
                continue
            if status == _TIMEOUT and out.announced and not graced:
                graced = True
                library.c4_ring_deadline(self._ring, ctypes.c_int64(order.deadline_ns + int(WITNESS_S * 1e9)))
                continue
            self._fail(status, Failure(transport, job.announcement, timeout_s))

    def _fail(self, status: int, failure: Failure) -> None:
        out = self._out
        rest = b"".join(
            ctypes.string_at(address, count)
            for address, count in ((out.rest_head, out.rest_head_bytes), (out.rest_body, out.rest_body_bytes))
            if address and count
        )
        if status == _MISMATCH:
            failure.mismatch(Announcement.unpack(bytes(out.announcement)), rest)
        if status == _LOST_PREDECESSOR:
            failure.lost(self.transport.predecessor, out.error, rest)
        if status == _LOST_SUCCESSOR:
            failure.lost(self.transport.successor, out.error)
        if status == _TOLD:
            failure.told(bytes(out.text[: out.text_bytes]), rest)
        if status == _TIMEOUT:
            failure.timed_out(bool(out.announced), out.awaited, rest)
        failure.protocol(rest)


def native_engine(transport: RingTransport, ring_address: int) -> NativeEngine | None:
    """The compiled engine, or None where it cannot be had."""
    library = load_library()
    return None if library is None else NativeEngine(transport, library, ring_address)


def runs_natively(element_type: int) -> bool:
    """Whether the compiled engine adds this type (float16 needs a compiler that knows it)."""
    library = load_library()
    return library is not None and (element_type != ElementType.FLOAT16 or bool(library.c4_ring_has_half()))


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """Compiled if need be; None, and one warning, where that fails. Safe from several processes at once."""
    try:
        library = ctypes.CDLL(str(_library_path()))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("The compiled ring is not available, Python's slower one runs instead: %s", error)
        return None
    library.c4_ring_new.restype = ctypes.c_void_p
    library.c4_ring_new.argtypes = []
    library.c4_ring_delete.argtypes = [ctypes.c_void_p]
    library.c4_ring_begin.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    library.c4_ring_run.argtypes = [ctypes.c_void_p]
    library.c4_ring_deadline.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return library


def _library_path() -> Path:
    from kernels.build import cache_folder, compiler

    if sys.platform != "linux":
        raise OSError(f"it is built on Linux only, this is {sys.platform}")
    key = hashlib.sha256(_SOURCE.read_bytes() + repr((platform.machine(), _FLAGS)).encode()).hexdigest()[:20]
    folder = cache_folder()
    path = folder / f"c4_ring-{key}.so"
    if path.exists():
        return path
    command = compiler()
    if command is None:
        raise OSError("there is no C++ compiler")
    folder.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch) / path.name
                done = subprocess.run(
                    [command, *_FLAGS, str(_SOURCE), "-o", str(built)],
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=120,
                )
                if done.returncode != 0:
                    raise OSError(f"{command} failed: {' '.join(done.stderr.splitlines()[:3])}")
                built.replace(path)  # atomic: no process ever sees half a library
    return path
