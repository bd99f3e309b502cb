"""The keeper of a node: a Ray actor that holds peers' parts in its node's memory, says what is there and puts a version together.

One per node, started before it is needed. Everything that decides stands in ``parts``; this is a shell.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from typing import Any

import ray

from actors.c4.recovery.memory import REPORTS, STATES, PartFolder, clean_stale, memory_root, own, remove_run
from actors.c4.recovery.parts import Choice, PartError, PartId, unpack, write_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inventory:
    """What a node holds."""

    node_id: str
    reports: tuple[PartId, ...]
    states: tuple[PartId, ...]


@dataclass(frozen=True)
class Restored:
    """A version put together on a node: the checkpoint's folder and the ranks' parts as files."""

    node_id: str
    folder: str
    """Of the merged files of all ranks; empty for states."""
    parts: tuple[tuple[int, str], ...]
    """(rank of the version, path of its part in the node's memory)."""


class Keeper:
    """State of the actor; usable without Ray. ``node_id``: of the node that it runs on."""

    def __init__(self, run: str, root: str | None, node_id: str, keep: int = 2):
        self.run, self.root, self.node_id, self.keep = run, memory_root(root), node_id, keep
        self.folders = {channel: PartFolder(self.root, run, node_id, channel) for channel in (REPORTS, STATES)}
        try:
            for left in clean_stale(self.root):
                logger.info("Removed what a run left in memory whose keeper is gone: %s", left)
            own(self.root, run, node_id)
        except OSError as error:  # it will be said again, and better, when a part is to be stored
            logger.warning("The memory tier in %s cannot be prepared: %s", self.root, error)

    def put(self, channel: str, part_id: PartId, data: Any) -> bool:
        """Stores a peer's part (bytes-like, checked); false when there is no room: the peer goes on without a copy."""
        folder = self.folders[channel]
        try:
            if unpack(data).id != part_id:
                raise PartError("it names another rank or version")
            folder.store_packed(part_id, [data])
        except (OSError, PartError) as error:
            logger.warning("Node %s could not keep the part of rank %d: %s", self.node_id[:8], part_id.rank, error)
            return False
        folder.prune(part_id.rank, self.keep)
        return True

    def inventory(self) -> Inventory:
        reports, states = (tuple(self.folders[channel].inventory()) for channel in (REPORTS, STATES))
        return Inventory(self.node_id, reports, states)

    def fetch(self, channel: str, part_id: PartId) -> bytes:
        """A part for another node.

        Raises:
            PartError: it is missing or damaged.
        """
        return self.folders[channel].read(part_id)

    def assemble(self, channel: str, choice: Choice, ranks: tuple[int, ...], keepers: dict[str, Any]) -> Restored:
        """Brings the parts of ``ranks`` here and merges their files into one folder.

        Raises:
            PartError: no holder has an undamaged copy of a part.
        """
        folder = self.folders[channel]
        target = folder.folder.parent / f"restored-{channel}-{choice.version}"
        shutil.rmtree(target, ignore_errors=True)
        paths = []
        for rank in ranks:
            part_id = PartId(choice.version, rank, choice.world_size)
            part = unpack(self._obtain(channel, part_id, choice.holders[rank], keepers))
            if part.files:
                write_files(part, target)
            paths.append((rank, str(folder.path(part_id))))
        self._remove_older_restored(channel, keep=target.name)
        return Restored(self.node_id, str(target) if target.is_dir() else "", tuple(paths))

    def forget(self) -> None:
        """Deletes all that the run keeps on this node."""
        remove_run(self.root, self.run, self.node_id)

    def pid(self) -> int:
        return os.getpid()

    def _obtain(self, channel: str, part_id: PartId, holders: tuple[str, ...], keepers: dict[str, Any]) -> bytes:
        folder, reasons = self.folders[channel], []
        if self.node_id in holders:
            try:
                return folder.read(part_id)
            except PartError as error:
                reasons.append(str(error))
        for holder in holders:
            if holder == self.node_id or holder not in keepers:
                continue
            try:
                data = ray.get(keepers[holder].fetch.remote(channel, part_id), timeout=30)
            except (PartError, ray.exceptions.RayError) as error:
                reasons.append(str(error).strip().splitlines()[-1])
                continue
            folder.store_packed(part_id, [data])
            return data
        raise PartError(
            f"No copy of the part of rank {part_id.rank} in version {part_id.version}: {'; '.join(reasons)}"
        )

    def _remove_older_restored(self, channel: str, keep: str) -> None:
        for old in self.folders[channel].folder.parent.glob(f"restored-{channel}-*"):
            if old.name != keep:
                shutil.rmtree(old, ignore_errors=True)


def start_keeper(run: str, root: str | None, node_id: str, keep: int = 2) -> Any:
    """A keeper on a node; the handle. It ends with its owner, and is not restarted: what it held is files on its node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return (
        ray.remote(Keeper)
        .options(
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=8,  # two keepers fetch from each other while both assemble
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(run, root, node_id, keep)
    )
