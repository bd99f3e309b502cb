"""One recorder a worker process: its ring, heartbeat thread, stack file and link controls. No torch, no Ray.

Training never dies of recording: when the ring cannot be made, one warning says why and records go to private memory, where
nobody reads them, unless the configuration says ``required``.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from actors.c4.recorder.errors import RecorderError
from actors.c4.recorder.files import side_file
from actors.c4.recorder.layout import Communicator, default_directory, ring_path
from actors.c4.recorder.links import LinkControls
from actors.c4.recorder.ring import RingWriter, new_ring

logger = logging.getLogger("sextant.c4.recorder")

HEARTBEAT_THREAD = "c4-heartbeat"
"""Name of the thread, in /proc too: from its waits for a processor the agent knows a busy host."""


@dataclass(frozen=True)
class RecordingConfig:
    """What a worker records, and for which run."""

    run: str
    generation: int
    """Of the worker group: grows with each restart."""
    rank: int
    """Global rank."""
    world_size: int
    directory: str | None = None
    """Of the rings; None: ``SEXTANT_C4_DIR``, else a folder of this user in /dev/shm."""
    operations: int = 4096
    """Operations kept; a power of two."""
    edges: int = 8192
    """Records of connections kept, two an operation; a power of two."""
    heartbeat_s: float = 0.05
    required: bool = False
    """Raise when the ring cannot be made, instead of a warning and going on unrecorded."""

    def __post_init__(self) -> None:
        if self.generation < 0 or not 0 <= self.rank < self.world_size:
            raise RecorderError(
                f"A recording needs a generation from 0 and a rank in the job, not generation {self.generation}, "
                f"rank {self.rank} of {self.world_size}."
            )
        if not 0.001 <= self.heartbeat_s <= 60:
            raise RecorderError(f"The heartbeat comes every 0.001 to 60 seconds, not {self.heartbeat_s}.")


class Recorder:
    """Holds the ring of this process. ``ring`` is always there; ``path`` is None when nobody can read it."""

    def __init__(self, config: RecordingConfig):
        """Make the ring and start the heartbeat. Raises RecorderError when that fails and ``config.required``."""
        self.config = config
        self.ring, self.links, self._stack_file = _make(config)
        self.path = self.ring.path
        self._pid = os.getpid()
        self._names: dict[str, int] = {}
        self._lock = threading.Lock()
        self._watched: list[tuple[weakref.ref[Any], Callable[[Any], bool]]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=HEARTBEAT_THREAD, daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def unique_name(self, name: str) -> str:
        """``name``, or ``name#2`` and so on when this process had a group of that name before (destroyed and made again)."""
        with self._lock:
            count = self._names[name] = self._names.get(name, 0) + 1
        return name if count == 1 else f"{name}#{count}"

    def communicator(self, name: str, role: str, ranks: tuple[int, ...]) -> int:
        """Index of a communicator in the ring's table, entered now if need be."""
        return self.ring.add_communicator(Communicator(name, role, ranks))

    def watch(self, work: Any, finished: Callable[[Any], bool]) -> None:
        """Ask ``finished(work)`` at every heartbeat until it says True or ``work`` is gone: ends that nobody waits for."""
        with self._lock:
            self._watched.append((weakref.ref(work), finished))

    def close(self) -> None:
        """Stop the heartbeat and mark the ring as ended in order; its file stays for the reader. Twice does no harm."""
        if os.getpid() != self._pid:  # a forked child: the ring is its parent's
            return
        atexit.unregister(self.close)
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)
        self.ring.close()
        if self._stack_file is not None:
            faulthandler.unregister(signal.SIGUSR1)
            self._stack_file.close()
            self._stack_file = None

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # not Linux: nobody asks for it there
            Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(HEARTBEAT_THREAD)
        while not self._stopped.wait(self.config.heartbeat_s):
            self.ring.beat()
            if self._watched:
                self._poll()

    def _poll(self) -> None:
        with self._lock:
            watched, self._watched = self._watched, []
        kept = []
        for reference, finished in watched:
            work = reference()
            try:
                if work is not None and not finished(work):
                    kept.append((reference, finished))
            except Exception:  # the heart must go on beating; the operation's owner meets the error itself
                logger.exception("Polling an operation for its end failed; it is not watched any longer.")
            del work
        with self._lock:
            self._watched += kept


def _make(config: RecordingConfig) -> tuple[RingWriter, LinkControls, IO[str] | None]:
    sizes = {"op_capacity": config.operations, "edge_capacity": config.edges}
    try:
        directory = Path(config.directory) if config.directory else default_directory()
        ring = new_ring(directory, config.run, config.generation, config.rank, config.world_size, **sizes)
        path = ring_path(directory, config.run, config.generation, config.rank, ring.pid)
        links = LinkControls.create(side_file(path, ".links"), config.world_size)
        return ring, links, _register_stacks(side_file(path, ".stack"))
    except RecorderError as error:
        if config.required:
            raise
        logger.warning("Collectives of rank %d are not recorded: %s", config.rank, error)
        private = RingWriter(
            None, run=config.run[:32], generation=config.generation, rank=config.rank, world_size=config.world_size
        )
        return private, LinkControls.create(None, config.world_size), None


def _register_stacks(path: Path) -> IO[str] | None:
    try:
        file = path.open("w")
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True, chain=False)
        return file
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        logger.warning("SIGUSR1 will not dump this worker's stacks: %s", error)
        return None
