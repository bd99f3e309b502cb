"""Settings of recovery: checkpoints in two memories and on disk, warm processes, budgets. Imports no Ray."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from actors.c4.monitors.settings import MonitorSettings
from actors.c4.recovery.policy import Prices


@dataclass(frozen=True)
class CheckpointSettings:
    """Where reported checkpoints and step states go."""

    memory: bool = True
    """Keep every reported checkpoint in the memory of its node and a peer's; false: Ray Train's own upload, nothing else."""
    wait_for_peer: bool = False
    """``report`` returns when the peer has its copy, so that a lost node loses no step; else it may lose one."""
    disk_interval_s: float = 60.0
    """At most this often a reported checkpoint is written to the run's storage, too (and always the last one); 0: each."""
    memory_dir: str | None = None
    """Folder of the memory tier; null: shared memory."""
    versions: int = 2
    """Versions held in memory."""
    random_states: bool = True
    """Store the states of the generators of torch, numpy and ``random`` with each report; ``get_checkpoint`` puts them back."""

    def __post_init__(self) -> None:
        if self.versions < 2:
            raise ValueError(f"versions must be at least 2 (one may be incomplete), not {self.versions}.")
        if self.disk_interval_s < 0:
            raise ValueError(f"disk_interval_s cannot be negative, not {self.disk_interval_s}.")


@dataclass(frozen=True)
class C4Settings:
    """Of a ``C4Trainer``."""

    monitors: MonitorSettings = field(default_factory=MonitorSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    prices: Prices = field(default_factory=Prices)
    warm_workers: bool = True
    """Keep a process with the imports done ready for each worker (about 250 MB each), so that a restart imports nothing."""
    preload: tuple[str, ...] = ()
    """Modules to import in warm processes beyond torch, Ray Train and what the loop's globals name."""
    max_restarts: int = -1
    """Restarts for faults of hardware, communication or processes; -1: no limit. The loop's own errors count elsewhere."""
    max_restarts_without_progress: int = 5
    """Give up after this many restarts in a row in which no new checkpoint or step appeared."""
    wait_for_nodes_s: float = 120.0
    """How long to wait for enough nodes before the run ends with a sentence."""
    verdict_wait_s: float = 1.0
    """How long a restart after a death waits for the master to name what died, before it chooses nodes."""
    expected_run_s: float = math.inf
    """How long the whole run should take without faults: near its end a restart no longer pays, and a slow part is lived with."""
    folder: str | None = None
    """Where the master keeps its state; null: below the temporary folder of the driver's node."""
    ring_folder: str | None = None
    """Where workers' rings lie, the same path on every node; null: shared memory."""

    def __post_init__(self) -> None:
        if self.max_restarts < -1 or self.max_restarts_without_progress < 1:
            raise ValueError("max_restarts must be at least -1 and max_restarts_without_progress at least 1.")
        if not self.expected_run_s > 0:
            raise ValueError(f"expected_run_s must be positive, not {self.expected_run_s}.")
