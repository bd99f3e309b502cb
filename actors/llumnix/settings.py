"""Settings of the instance and scheduler actors; sections of ``apps.llumnix``'s configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from actors.llumnix.policy.dispatch import DispatchName
from actors.llumnix.policy.rebalance import RebalanceConfig


@dataclass(frozen=True)
class InstanceSettings:
    """How many instances there are, what each may use, and its time limits."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    count: int = 2
    num_cpus: float = 0.0
    """CPUs that Ray reserves for one engine's process; 0 places it anywhere."""
    num_gpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    """Custom resources, e.g. a MIG slice."""
    poll_timeout_s: float = 10.0
    """Longest wait of an ingress's long-poll."""
    ingress_timeout_s: float = 20.0
    """An ingress that has not polled for so long is dead: its requests are aborted."""
    heartbeat_s: float = 1.0
    """An idle instance pushes its load so often."""
    start_timeout_s: float = 600.0
    """Longest time to load the model."""
    health_check_period_s: float = 2.0
    reachable_from: Literal["host", "cluster"] = "host"
    """Whether instances on other nodes may send requests here; ``cluster`` listens at the node's IP address."""


@dataclass(frozen=True)
class SchedulerSettings:
    """How requests are placed and when they are moved."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    dispatch: DispatchName = "llumnix"
    migration: bool = True
    """Move requests from the least free to the freest instance as the load changes."""
    interval_ms: float = 50.0
    rebalance: RebalanceConfig = field(default_factory=RebalanceConfig)
    max_migrations: int = 1
    """Migrations under way into and out of one instance together."""
    order_timeout_s: float = 30.0
    """A source that has not reported by then is given up (fencing keeps the request safe)."""
    backoff_s: float = 0.5
    """Pause of a source after a migration that did not commit."""
    sample_interval_s: float = 0.25
    """How often loads are recorded for reports."""
    history: int = 10_000
    """Migrations remembered; placements and samples ten times as many."""


@dataclass(frozen=True)
class SchedulerAddress:
    """Where to find the scheduler: the Ray actor in ``namespace`` whose name has this beginning and this end.

    Serve puts the version of the code between them; a scheduler without Serve has its whole name in ``prefix``.
    """

    prefix: str
    suffix: str = ""
    namespace: str = "serve"
