"""Configuration of the llumnix app: model and engine, instances, scheduler, migration, front door, Ray."""

from __future__ import annotations

from pathlib import PurePath

from pydantic import Field, field_validator, model_validator

from actors.cluster.session import RayConfig
from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.migration.config import MigrationConfig
from actors.llumnix.settings import InstanceSettings, SchedulerSettings
from apps.program.config import Config


class ServerConfig(Config):
    """The OpenAI-compatible front door."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    model_name: str | None = None
    """Name of the model in the API; by default the last part of engine.model."""
    ingresses: int = Field(default=1, ge=1)
    """Replicas of the front door."""
    max_ongoing_requests: int = Field(default=1000, ge=1)
    """Requests under way at one ingress; further ones wait in Serve's proxy."""
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024)
    request_timeout_s: float = Field(default=600.0, gt=0)
    dispatch_timeout_s: float = Field(default=30.0, gt=0)
    """How long a request waits for an instance when none is ready."""


class LlumnixConfig(Config):
    """``python -m apps.llumnix VERB [--config configs/llumnix/<preset>.yaml] [key=value ...]``."""

    app_name: str = "llumnix"
    """Name of the Serve application."""
    engine: EngineConfig = EngineConfig()
    instances: InstanceSettings = InstanceSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    migration: MigrationConfig = MigrationConfig()
    server: ServerConfig = ServerConfig()
    ray: RayConfig = RayConfig()

    @field_validator("engine")
    @classmethod
    def _engine_in_range(cls, engine: EngineConfig) -> EngineConfig:
        for name in ("threads", "kv_memory_mib", "block_size", "max_model_len", "max_num_seqs", "max_batched_tokens"):
            _at_least(name, getattr(engine, name), 1)
        if not 0 <= engine.watermark < 1:
            raise ValueError(f"watermark must be in [0, 1), not {engine.watermark}")
        return engine

    @field_validator("instances")
    @classmethod
    def _instances_in_range(cls, instances: InstanceSettings) -> InstanceSettings:
        _at_least("count", instances.count, 1)
        for name in ("num_cpus", "num_gpus"):
            _at_least(name, getattr(instances, name), 0)
        for name in ("poll_timeout_s", "ingress_timeout_s", "heartbeat_s", "start_timeout_s", "health_check_period_s"):
            _positive(name, getattr(instances, name))
        if instances.ingress_timeout_s <= instances.poll_timeout_s:
            raise ValueError("ingress_timeout_s must be longer than poll_timeout_s")
        return instances

    @field_validator("scheduler")
    @classmethod
    def _scheduler_in_range(cls, scheduler: SchedulerSettings) -> SchedulerSettings:
        for name in ("interval_ms", "order_timeout_s", "sample_interval_s"):
            _positive(name, getattr(scheduler, name))
        for name in ("max_migrations", "history"):
            _at_least(name, getattr(scheduler, name), 1)
        return scheduler

    @model_validator(mode="after")
    def _block_size_is_the_kernels(self) -> LlumnixConfig:
        if self.engine.block_size != 16:
            raise ValueError("engine.block_size must be 16: the kernels are laid out for it")
        return self

    @property
    def model_name(self) -> str:
        """Name of the model in the API."""
        return self.server.model_name or PurePath(self.engine.model).name

    @property
    def url(self) -> str:
        """Base URL of the server as seen from this host."""
        host = "127.0.0.1" if self.server.host in ("0.0.0.0", "::") else self.server.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server.port}"


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be above 0, not {value}")
