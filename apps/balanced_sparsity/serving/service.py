"""A served LSTM on Ray Serve: shards that hold streams, a door that sends each stream to the shard of its name, start and end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import torch
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from actors.cluster.session import ray_session
from apps.balanced_sparsity.config import BalancedSparsityConfig, ServingConfig
from apps.balanced_sparsity.serving.http_app import build_app
from apps.balanced_sparsity.serving.streams import (
    Opened,
    Refusal,
    Stepped,
    StreamInfo,
    StreamTable,
    TableInfo,
    load_served,
)
from apps.program.errors import UserError

logger = logging.getLogger("sextant.balanced_sparsity.serving")
READY_TIMEOUT_S = 60.0


class Shard:
    """A ``StreamTable`` in a process of its own. Its methods never wait, so Serve runs them one after the other."""

    def __init__(self, settings: ServingConfig, start: str, packed: str | None):
        torch.set_num_threads(settings.threads)
        self._table = StreamTable(
            load_served(start, packed), settings.max_streams, settings.evict_after_idle_s, settings.max_frames
        )

    async def open(self, stream: str) -> Opened | Refusal:
        return self._table.open(stream)

    async def step(self, stream: str, frames: Sequence[Sequence[float]]) -> Stepped | Refusal:
        return self._table.step(stream, frames)

    async def status(self, stream: str) -> StreamInfo | Refusal:
        return self._table.status(stream)

    async def close(self, stream: str) -> StreamInfo | Refusal:
        return self._table.close(stream)

    async def info(self) -> TableInfo:
        return self._table.info()


class Door:
    """The HTTP application over all shards; it keeps nothing, a stream's shard follows from its name."""

    def __init__(self, settings: ServingConfig, *shards: DeploymentHandle):
        self._settings, self._shards = settings, shards

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self, self._settings.max_body_bytes)

    async def open(self, stream: str) -> Opened | Refusal:
        return await self._call(self._shard(stream), "open", stream)

    async def step(self, stream: str, frames: Sequence[Sequence[float]]) -> Stepped | Refusal:
        return await self._call(self._shard(stream), "step", stream, frames)

    async def status(self, stream: str) -> StreamInfo | Refusal:
        return await self._call(self._shard(stream), "status", stream)

    async def close(self, stream: str) -> StreamInfo | Refusal:
        return await self._call(self._shard(stream), "close", stream)

    async def info(self) -> list[TableInfo | Refusal]:
        """Of every shard."""
        return list(await asyncio.gather(*(self._call(number, "info") for number in range(len(self._shards)))))

    def _shard(self, stream: str) -> int:
        digest = hashlib.blake2b(stream.encode(), digest_size=8).digest()  # the same in every process, unlike hash()
        return int.from_bytes(digest, "big") % len(self._shards)

    async def _call(self, shard: int, method: str, *arguments: Any) -> Any:
        """What the shard answers. Its death is a 503: it begins anew, and the streams that it held are gone (404 then)."""
        try:
            return await getattr(self._shards[shard], method).remote(*arguments)
        except RayTaskError:  # a mistake of ours: the door logs it and answers 500
            raise
        except (RayError, RayServeException) as error:
            logger.warning("shard %d did not answer %s: %s", shard, method, str(error).splitlines()[0])
            return Refusal(503, f"Shard {shard} does not answer; its streams are lost when it begins anew.")


def application(settings: ServingConfig, start: str, packed: str | None) -> serve.Application:
    """The bound application: a deployment of one replica for each shard, so that a stream has one home, behind a door."""
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    common: dict[str, Any] = {
        "num_replicas": 1,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": 5.0,
        "logging_config": quiet,
        "max_constructor_retry_count": 2,
    }
    shards = [
        serve.deployment(
            Shard, name=f"Shard{number}", max_ongoing_requests=100, ray_actor_options={"num_cpus": 1}, **common
        ).bind(settings, start, packed)  # type: ignore[attr-defined]  # Serve types the decorator form
        for number in range(settings.shards)
    ]
    door = serve.deployment(
        serve.ingress()(Door), name="Door", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}, **common
    )
    return door.bind(settings, *shards)  # type: ignore[attr-defined]


@contextlib.contextmanager
def running_service(config: BalancedSparsityConfig, start: str, packed: str | None = None) -> Iterator[str]:
    """A server for the length of the ``with``; yields its URL. On the Ray that is there, or on a new one.

    Raises:
        UserError: no such model, a port in use, Serve already running, a deployment that failed. ClusterError.
    """
    settings = config.serving
    load_served(start, packed)  # found wanting here, before Ray is started for nothing
    _check_port(settings.host, settings.port)
    with ray_session(config.ray):
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        if serve.status().proxies:
            raise UserError("Ray Serve already runs on this cluster: end it with 'serve shutdown' first.")
        serve.start(
            http_options={"host": settings.host, "port": settings.port, "request_timeout_s": None},  # type: ignore[arg-type]
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        try:
            try:
                serve.run(application(settings, start, packed), name=settings.app_name, route_prefix="/")
            except RuntimeError as error:
                first = str(error).strip().splitlines()[0]
                raise UserError(f"The application could not be deployed: {first}") from error
            url = f"http://{settings.host}:{settings.port}"
            _wait_until_ready(url)
            yield url
        finally:
            try:
                serve.shutdown()
            except Exception as error:
                logger.warning("the server did not end cleanly: %s", error)


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    with httpx.Client(base_url=url, timeout=10.0, trust_env=False) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if client.get("/health").status_code == 200:
                    return
            if time.monotonic() > deadline:
                raise UserError(f"The server at {url} did not become ready within {READY_TIMEOUT_S:g} s.")
            time.sleep(0.2)


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"The server cannot listen at {host}:{port} ({(error.strerror or str(error)).lower()}): stop what uses it or "
                "choose another with serving.port=N."
            ) from error
