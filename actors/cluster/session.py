"""The one way to start or attach to Ray, for every program.

Attaches when an address is configured, RAY_ADDRESS is set (as in a submitted job) or a cluster begun by ``ray start``
runs on this host; else starts a Ray of its own and ends it on leaving. A Ray that it did not start is never stopped.
Ray is imported here only after the environment is set, because Ray reads much of it at import.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from actors.cluster import ray_private
from actors.cluster.errors import ClusterError

__all__ = ["ClusterError", "RayConfig", "RaySession", "connect", "environment", "ray_session"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayConfig:
    """How a program meets Ray; the section ``ray`` of each app's configuration."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    address: str | None = None
    """``host:port`` (or ``ray://host:port``), ``auto``: the cluster on this host or fail, ``local``: always one's own,
    null: RAY_ADDRESS, else the cluster on this host, else one's own."""
    namespace: str | None = None
    num_cpus: int | None = None
    """Logical CPUs of a Ray that is started here; null takes the machine's. Ignored when attaching."""
    num_gpus: int | None = None
    object_store_memory_mib: int | None = None
    dashboard: bool = False
    """Start the dashboard (about 220 MB) with a Ray that is started here."""
    dashboard_port: int | None = None
    log_to_driver: bool = True
    working_dir: str | None = None
    """When attaching from outside a job: folder of code that is uploaded to the cluster's workers."""
    connect_timeout_s: float = 10.0


@dataclass
class RaySession:
    """A connection to Ray. ``started``: this session began that Ray, so ``close`` ends it."""

    address: str
    started: bool
    dashboard_url: str | None
    namespace: str
    owns_connection: bool = True

    def close(self) -> None:
        """Ends a Ray that this session started; otherwise only lets go of the connection that it made."""
        import ray

        if self.owns_connection and ray.is_initialized():
            ray.shutdown()
        self.owns_connection = False


@contextlib.contextmanager
def ray_session(config: RayConfig | None = None) -> Iterator[RaySession]:
    """``with ray_session(config.ray) as session:`` connects, and closes in every ending.

    Raises:
        ClusterError: see ``connect``.
    """
    session = connect(config)
    try:
        yield session
    finally:
        session.close()


def connect(config: RayConfig | None = None) -> RaySession:
    """Attaches to Ray or starts one; uses the connection that this process already has, if it has one.

    Raises:
        ClusterError: the address is unreachable or malformed, authentication failed, or Ray did not start.
    """
    config = config or RayConfig()
    for name, value in environment().items():
        os.environ.setdefault(name, value)
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            return _session(started=False, owns_connection=False)
    address = _address(config)
    if address is None:
        return _start(config)
    return _attach(config, address)


def environment() -> dict[str, str]:
    """Ray's settings that Sextant wants unless the user has set them; must be set before Ray is imported."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        # The defaults (2 s poll, 0.1 s deadline) make short trainings look hung and busy replicas look dead.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1",
        # Starting a node takes long where others load the machine; the default gives up after 30 s.
        "RAY_raylet_start_wait_time_s": "120",
        # A task with num_gpus=0 keeps the CUDA_VISIBLE_DEVICES it was given; what Ray will do by default, without its warning.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def _address(config: RayConfig) -> str | None:
    """The address to attach to, or None to start a Ray."""
    wanted = config.address if config.address is not None else os.environ.get("RAY_ADDRESS") or None
    if wanted == "local":
        return None
    if wanted not in (None, "auto"):
        return wanted
    running = _running_here(config.connect_timeout_s)
    if running is None and wanted == "auto":
        raise ClusterError(
            "No Ray cluster runs on this host: begin one with 'ray start --head' or leave ray.address out."
        )
    return running


def _running_here(timeout_s: float) -> str | None:
    """The cluster that ``ray start`` left on this host, if it still answers."""
    address = ray_private.address_of_running_cluster()
    return address if address and _unreachable(address, timeout_s) is None else None


def _unreachable(address: str, timeout_s: float) -> str | None:
    """None when a TCP connection can be made, else why not. Ray itself would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        return "it is not of the form host:port"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _start(config: RayConfig) -> RaySession:
    # Token authentication is what Ray does by default for its own cluster; saying so keeps it from warning about it.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    options: dict[str, Any] = {
        "address": "local",
        "num_cpus": config.num_cpus,
        "num_gpus": config.num_gpus,
        "include_dashboard": config.dashboard,
        "log_to_driver": config.log_to_driver,
        "logging_level": logging.WARNING,
        "namespace": config.namespace,
    }
    if config.dashboard_port is not None:
        options["dashboard_port"] = config.dashboard_port
    if config.object_store_memory_mib is not None:
        options["object_store_memory"] = config.object_store_memory_mib << 20
    import ray

    try:
        ray_private.refresh_authentication()
        ray.init(**options)
    except Exception as error:
        ray.shutdown()
        raise ClusterError(f"Ray could not be started: {_first_line(error)}") from error
    return _session(started=True)


def _attach(config: RayConfig, address: str) -> RaySession:
    if (problem := _unreachable(address, config.connect_timeout_s)) is not None:
        raise ClusterError(
            f"No Ray cluster answers at {address} ({problem}): "
            "check ray.address or RAY_ADDRESS, or give ray.address=local to start one here."
        )
    if "RAY_AUTH_MODE" not in os.environ and ray_private.authentication_token() is not None:
        os.environ["RAY_AUTH_MODE"] = "token"
    if not address.startswith("ray://") and os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
        _check(address, config.connect_timeout_s)
    import ray

    try:
        ray_private.refresh_authentication()
        ray.init(
            address=address,
            namespace=config.namespace,
            log_to_driver=config.log_to_driver,
            logging_level=logging.WARNING,
            runtime_env=_runtime_env(config) or None,
        )
    except Exception as error:
        ray.shutdown()
        if isinstance(error, ray.exceptions.AuthenticationError):
            raise _refused(address) from error
        raise ClusterError(f"Attaching to the Ray cluster at {address} failed: {_first_line(error)}") from error
    return _session(started=False)


def _check(address: str, timeout_s: float) -> None:
    """Turns what Ray would retry for long, or report deep in a traceback, into a sentence at once."""
    import ray

    found = ray_private.probe(address, timeout_s)
    if found.outcome == "unauthenticated":
        raise _refused(address)
    if found.outcome == "unreachable":
        raise ClusterError(
            f"What listens at {address} does not answer like the head of a Ray cluster ({found.reason})."
        )
    if found.ray_version != ray.__version__:
        raise ClusterError(
            f"The cluster at {address} runs Ray {found.ray_version}, this program Ray {ray.__version__}: they must be equal."
        )


def _refused(address: str) -> ClusterError:
    return ClusterError(
        f"The Ray cluster at {address} refused this client for want of its token: put the token into RAY_AUTH_TOKEN "
        "(or a file that RAY_AUTH_TOKEN_PATH names) and set RAY_AUTH_MODE=token."
    )


def _runtime_env(config: RayConfig) -> dict[str, Any]:
    """What the cluster's workers need that a local Ray's workers inherit: our environment, and the code if asked for."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    given: Mapping[str, str] = job.get("env_vars") or {}
    # A submitted job brings its own runtime environment, and Ray refuses the same key twice.
    env: dict[str, Any] = {"env_vars": {k: os.environ[k] for k in environment() if k not in given}}
    if config.working_dir is not None and "working_dir" not in job:
        env |= {"working_dir": config.working_dir, "excludes": [".git/", ".venv/", "runs/"]}
    return env


def _session(started: bool, owns_connection: bool = True) -> RaySession:
    import ray

    context = ray.get_runtime_context()
    url = getattr(ray._private.worker.global_worker.node, "webui_url", None) if ray.is_initialized() else None
    return RaySession(
        address=context.gcs_address,
        started=started,
        dashboard_url=f"http://{url}" if url else None,
        namespace=context.namespace,
        owns_connection=owns_connection,
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."
