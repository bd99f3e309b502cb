"""Configuration of the migperf app. Verbs that need settings add their sections here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from actors.cluster.session import RayConfig
from apps.program.config import Config


class SweepConfig(Config):
    """Which trials a sweep has, and how it chooses among them."""

    backend: Literal["cpu", "mig", "green", "mps", "sim"] = "cpu"
    gpu: str = "0"
    """Number of this machine's GPU; for ``sim`` the name of a model (A100-80GB, ...)."""
    memory_mib: float | None = None
    """Of the whole device, where the backend limits memory in proportion; null: what it finds."""
    profiles: tuple[str, ...] = ()
    """Empty: all of the backend's, and ``full`` (no slices)."""
    workloads: tuple[str, ...] = ("minilm",)
    modes: tuple[Literal["infer", "train"], ...] = ("infer",)
    batches: tuple[int, ...] = Field(default=(1, 4, 16), min_length=1)
    sequences: tuple[int, ...] = (64,)
    rates_per_s: tuple[float | None, ...] = (None,)
    """Batches that arrive a second (Poisson); null: the next begins when the last one ends."""
    corun: tuple[bool, ...] = (False,)
    """true: every slice of the profile runs the same beside the measured one."""
    scale: float = 1.0
    """Shrinks the workloads, for a CPU."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    window_s: float = Field(default=2.0, gt=0)
    """Measuring of a trial; a fifth of it is the first look."""
    search: Literal["guided", "grid"] = "guided"
    scheduler: Literal["best", "asha", "none"] = "best"
    regret: float = Field(default=0.02, ge=0)
    """A question is closed when nothing is likely to beat the best by more."""
    latency_limit_ms: float | None = None
    """P99 that a configuration must keep."""
    measurements: str | None = None
    """CSV of published measurements: what ``sim`` draws from."""


class ShareConfig(Config):
    """How workloads on one device disturb each other: slices against sharing without slices."""

    backend: Literal["cpu", "mig", "green", "mps"] = "cpu"
    gpu: str = "0"
    profile: str | None = None
    """null: the largest of which ``processes`` fit."""
    processes: int = Field(default=2, ge=2)
    workload: str = "minilm"
    mode: Literal["infer", "train"] = "infer"
    batch: int = 4
    sequence: int = 64
    rate_per_s: float | None = None
    scale: float = 0.25
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    window_s: float = Field(default=2.0, gt=0)
    rounds: int = Field(default=3, ge=1)


class HybridConfig(Config):
    """Training and serving on one device whose partition follows the load."""

    live: bool = False
    """true: on the cpu backend, for real; false: in simulation."""
    gpu: str = "A100-40GB"
    """Of the simulation."""
    measurements: str | None = None
    """CSV with latencies of both workloads on the GPU; null: the built-in example's."""
    serve: str = "bert-base-multilingual-cased"
    train: str = "resnet50_moco"
    sequence: int | None = 64
    """Tokens of a served request, where the table has several."""
    train_batch: int = 16
    day_s: float = Field(default=7200.0, gt=0)
    """Length of the load's period."""
    night_per_s: float = Field(default=60.0, ge=0)
    peak_per_s: float = Field(default=600.0, gt=0)
    latency_limit_ms: float = Field(default=100.0, gt=0)
    attainment: float = Field(default=0.99, gt=0, le=1)
    cut_s: float = 4.0
    """Seconds to destroy and create GPU instances."""
    start_serving_s: float = 10.0
    """From a new slice to a server that is warm."""
    start_training_s: float = 15.0
    """A checkpoint, a new process, and the state loaded again."""
    seed: int = 0


class MigperfConfig(Config):
    """``python -m apps.migperf VERB [--config configs/migperf/<preset>.yaml] [key=value ...]``."""

    ray: RayConfig = RayConfig()
    sweep: SweepConfig = SweepConfig()
    share: ShareConfig = ShareConfig()
    hybrid: HybridConfig = HybridConfig()
