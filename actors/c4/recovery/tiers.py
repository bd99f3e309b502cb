"""A worker's side of the checkpoint tiers: own node's memory at once, a peer's memory in the background, disk at an interval.

Nothing here stops training: a tier that fails warns, counts and is tried again with the next checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.c4.recovery import disk
from actors.c4.recovery.memory import REPORTS, STATES, PartFolder, memory_root
from actors.c4.recovery.parts import Part, PartError, PartId, Version, pack, unpack
from actors.c4.recovery.settings import CheckpointSettings
from actors.cluster.metrics import counter, gauge

logger = logging.getLogger(__name__)

_ERRORS = counter("c4", "checkpoint", "errors", help="Checkpoint parts that a tier could not store.", tags=["tier"])
_STORED = counter("c4", "checkpoint_stored", "bytes", help="Bytes of checkpoint parts stored.", tags=["tier"])
_SECONDS = gauge("c4", "checkpoint_blocking", "seconds", help="How long the newest checkpoint held up the loop.")

_DISK_ATTEMPTS_AT_THE_END = 3
_PEER_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class WorkerPlan:
    """What a worker of a generation needs to know of its checkpoints."""

    run: str
    generation: int
    rank: int
    world_size: int
    node_id: str
    settings: CheckpointSettings
    state_part: str = ""
    """Path of this rank's part of the newest whole ``StepState``; empty when there is none."""
    state_from_rank: int = 0
    state_world_size: int = 0
    report_folder: str = ""
    """Folder of the newest whole reported checkpoint, merged; empty when there is none in memory."""
    report_part: str = ""
    """This rank's part of it (for the random states); empty when the world's size changed."""


class CheckpointTiers:
    """Of one worker process. ``put``: sends a part to the peer's keeper, returns a handle; None without a peer.

    ``wait``: waits for such a handle up to a number of seconds and says whether the peer has it.
    """

    def __init__(
        self,
        plan: WorkerPlan,
        put: Callable[[str, PartId, bytes], Any] | None = None,
        wait: Callable[[Any, float], bool] | None = None,
    ):
        self.plan, self._put, self._wait = plan, put, wait
        root = memory_root(plan.settings.memory_dir)
        self._folders = {channel: PartFolder(root, plan.run, plan.node_id, channel) for channel in (REPORTS, STATES)}
        self._sent: dict[str, Any] = {}
        self._peer_lost = False
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="c4-disk")
        self._flush: Future[None] | None = None
        self._newest: tuple[PartId, bytes] | None = None
        self._newest_target: tuple[Any, str] | None = None
        self._flushed: PartId | None = None
        self._last_flush = -float("inf")
        self._lock = threading.Lock()

    def store_report(self, number: int, files: Mapping[str, bytes], extra: Mapping[str, bytes]) -> bool:
        """Stores this rank's part of reported checkpoint ``number``; whether the node's memory has it."""
        part_id = PartId(Version(self.plan.generation, number), self.plan.rank, self.plan.world_size)
        return self._store(REPORTS, Part(part_id, files, extra))

    def store_state(self, step: int, data: bytes) -> bool:
        """Stores this rank's part of step state ``step``."""
        part_id = PartId(Version(self.plan.generation, step), self.plan.rank, self.plan.world_size)
        return self._store(STATES, Part(part_id, {}, {"state": data}))

    def disk_is_due(self) -> bool:
        """Whether the next reported checkpoint should go to disk: rank 0 asks, all ranks follow."""
        if self._flush is not None and not self._flush.done():
            return False
        return time.monotonic() - self._last_flush >= self.plan.settings.disk_interval_s

    def target(self, filesystem: Any, folder: str) -> None:
        """Where the newest reported checkpoint belongs on the storage (the name is known only after the ranks agreed)."""
        self._newest_target = (filesystem, folder)

    def flush(self) -> None:
        """Begins to write the newest reported checkpoint to its target in the background."""
        newest, target = self._newest, self._newest_target
        if newest is None or target is None:
            return
        self._last_flush = time.monotonic()
        try:
            disk.begin(*target)  # at once, so that the directory exists when the controller hears of it
        except OSError as error:
            self._disk_failed(target[1], error)
            return
        self._flush = self._disk.submit(self._write, newest, target)

    def finish(self) -> bool:
        """The loop has ended: the newest reported checkpoint must be on disk. Whether it is."""
        if self._flush is not None:
            self._flush.result()
        for attempt in range(_DISK_ATTEMPTS_AT_THE_END):
            if self._newest is None or self._newest_target is None or self._flushed == self._newest[0]:
                return True
            if attempt:
                time.sleep(0.5 * 2**attempt)
            try:
                disk.begin(*self._newest_target)
            except OSError as error:
                self._disk_failed(self._newest_target[1], error)
                continue
            self._write(self._newest, self._newest_target)
        return self._newest is None or self._flushed == self._newest[0]

    def wait_for_peer(self, channel: str) -> bool:
        """Waits for the peer to have what was sent last; false when it has not (or there is no peer)."""
        handle = self._sent.pop(channel, None)
        if handle is None or self._wait is None:
            return False
        if self._wait(handle, _PEER_TIMEOUT_S):
            return True
        _ERRORS.increase(tier="peer")
        if not self._peer_lost:
            self._peer_lost = True
            logger.warning("The peer's memory does not answer: checkpoints are in this node's memory and on disk only.")
        return False

    def restored_state(self) -> bytes | None:
        """This rank's part of the newest whole step state."""
        if not self.plan.state_part:
            return None
        return bytes(unpack(Path(self.plan.state_part).read_bytes()).extra["state"])

    def restored_random_states(self) -> bytes | None:
        """States of the generators when the restored checkpoint was reported by this rank."""
        if not self.plan.report_part:
            return None
        try:
            part = unpack(Path(self.plan.report_part).read_bytes())
        except (OSError, PartError) as error:
            logger.warning("The random states of the restored checkpoint cannot be read: %s", error)
            return None
        return bytes(part.extra["random"]) if "random" in part.extra else None

    def _store(self, channel: str, part: Part) -> bool:
        began = time.perf_counter()
        blob = b"".join(pack(part))
        if channel == REPORTS:
            self._newest, self._newest_target = (part.id, blob), None
        folder = self._folders[channel]
        try:
            folder.store_packed(part.id, [blob])
            stored = True
            _STORED.increase(len(blob), tier="memory")
        except OSError as error:
            stored = False
            _ERRORS.increase(tier="memory")
            logger.warning("Version %s is not in this node's memory: %s. Training goes on.", part.id.version, error)
        if self._put is not None and not self._peer_lost:
            # One copy in flight at most: a lost node then loses at most one version.
            if channel in self._sent:
                self.wait_for_peer(channel)
            try:
                self._sent[channel] = self._put(channel, part.id, blob)
            except Exception as error:  # Ray raises many kinds; none may end the loop
                _ERRORS.increase(tier="peer")
                logger.warning("The peer did not take version %s: %s", part.id.version, error)
            if self.plan.settings.wait_for_peer:
                self.wait_for_peer(channel)
        folder.prune(self.plan.rank, self.plan.settings.versions)
        _SECONDS.set(time.perf_counter() - began)
        return stored

    def _write(self, newest: tuple[PartId, bytes], target: tuple[Any, str]) -> None:
        part_id, blob = newest
        try:
            written = disk.write_part(*target, unpack(blob))
        except OSError as error:
            self._disk_failed(target[1], error)
            return
        _STORED.increase(written, tier="disk")
        with self._lock:
            if self._flushed is None or self._flushed < part_id:
                self._flushed = part_id

    def _disk_failed(self, folder: str, error: OSError) -> None:
        _ERRORS.increase(tier="disk")
        logger.warning(
            "The checkpoint %s is not on disk: %s. Training goes on with what is in memory; the next one is tried again.",
            folder.rpartition("/")[2],
            error,
        )


_tiers: CheckpointTiers | None = None


def set_tiers(tiers: CheckpointTiers | None) -> None:
    """Makes the worker process's tiers known to ``StepState``."""
    global _tiers
    _tiers = tiers


def tiers() -> CheckpointTiers | None:
    """Of this worker process; None outside a C4Trainer."""
    return _tiers
