"""The Instance deployment: each replica owns one engine actor in its own process, watches it, and ends with it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray import serve

from actors.llumnix.instance import start_engine_actor
from actors.llumnix.serve_door import deployment_actor_address
from apps.llumnix.config import LlumnixConfig

INSTANCE, INGRESS = "Instance", "Ingress"
logger = logging.getLogger("sextant.llumnix.instance")


class Instance:
    """A llumlet: starts its engine actor, fails its health check when that has died (Serve then replaces the replica)."""

    async def __init__(self, config: LlumnixConfig):  # type: ignore[misc]  # Serve awaits it
        context = serve.get_replica_context()
        self.instance_id = f"instance-{context.replica_id.unique_id}"
        self._engine = start_engine_actor(
            self.instance_id,
            config.engine,
            config.instances,
            config.migration,
            deployment_actor_address(config.app_name, INGRESS),
        )
        try:
            start = self._engine.start.remote()
            self.info = await asyncio.wait_for(_result(start), config.instances.start_timeout_s)
        except BaseException:
            ray.kill(self._engine)
            raise

    async def check_health(self) -> None:
        """Serve's health check: raises when the engine's process or its decode loop has ended."""
        await self._engine.ping.remote()

    async def engine_actor(self) -> Any:
        """Handle of the engine actor."""
        return self._engine

    async def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            try:
                await asyncio.wait_for(_result(engine.stop.remote()), 5.0)
            except Exception as error:  # it may be dead already; then there is nothing to stop
                logger.info("instance %s did not stop by itself: %s", self.instance_id, error)
            ray.kill(engine)


async def _result(reference: Any) -> Any:
    return await reference
