"""Configuration of the c4 app: limits of the offline diagnosis, the demo, the month's assumptions, Ray."""

from __future__ import annotations

from pydantic import Field

from actors.cluster.session import RayConfig
from apps.c4.fleet.month import MonthConfig
from apps.program.config import Config


class DumpConfig(Config):
    """What `diagnose` reads at most; files beyond it are left out with a warning."""

    max_file_mib: int = Field(default=128, ge=1, le=4096)
    max_files: int = Field(default=100_000, ge=1)


class DemoConfig(Config):
    """What `demo` trains and breaks."""

    workers: int = Field(default=4, ge=3, le=64)
    spare_nodes: int = Field(default=4, ge=1, le=64)
    """Virtual nodes beside those that hold the workers; each verdict takes one out."""
    batch: int = Field(default=480, ge=8)
    """Digits in a step, of all workers together."""
    width: int = Field(default=48, ge=4)
    """Channels of the network; with ``batch`` it decides how long a step takes."""
    learning_rate: float = Field(default=1e-3, gt=0)
    healthy_steps: int = Field(default=40, ge=10)
    """Steps before each fault, so that the monitors know what is usual."""
    last_steps: int = Field(default=20, ge=1)
    """Steps after the last fault."""
    slow_compute_factor: float = Field(default=4.0, gt=1)
    slow_link_bytes_per_s: float = Field(default=1.5e6, gt=0)
    patience_s: float = Field(default=60.0, gt=0)
    """How long a fault may stay unnamed, or training stand still, before the demo says that it failed."""
    seed: int = 7


class C4Config(Config):
    """``python -m apps.c4 VERB [--config configs/c4/<preset>.yaml] [key=value ...]``."""

    dumps: DumpConfig = DumpConfig()
    demo: DemoConfig = DemoConfig()
    month: MonthConfig = MonthConfig()
    ray: RayConfig = RayConfig()
