"""The Ingress deployment: the OpenAI-compatible FastAPI app over the frontend, inside a Serve replica."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from actors.cluster import metrics
from actors.llumnix.engine.request import Request
from actors.llumnix.frontend import Frontend, FrontendSettings, ServiceUnavailable, Stream
from actors.llumnix.ray_ports import RayInstance, RayScheduler
from actors.llumnix.serve_door import deployment_actor_address
from apps.llumnix.config import LlumnixConfig
from apps.llumnix.generation import ModelCard, PromptTokenizer
from apps.llumnix.http_app import HttpLimits, build_app
from apps.llumnix.instance_deployment import INGRESS
from apps.program.run_folder import to_json

logger = logging.getLogger("sextant.llumnix.ingress")
_received = metrics.counter("llumnix", "received", "requests", help="Requests accepted by an ingress.")


class LiveBackend:
    """The front door's ``Backend`` over the cluster."""

    def __init__(self, config: LlumnixConfig, tokenizer: PromptTokenizer):
        self.tokenizer = tokenizer
        self._config, self._created = config, int(time.time())
        self._scheduler = RayScheduler(deployment_actor_address(config.app_name, INGRESS))
        self._frontend = Frontend(
            self._scheduler, RayInstance, FrontendSettings(dispatch_timeout_s=config.server.dispatch_timeout_s)
        )

    def start(self) -> None:
        """Begin to follow the cluster, on the running loop."""
        self._frontend.start()

    async def stop(self) -> None:
        await self._frontend.stop()

    @property
    def card(self) -> ModelCard:
        """The model, with the longest sequence that every instance present can hold."""
        known = [info.max_model_len for info in self._frontend.infos.values()]
        longest = min(known, default=self._config.engine.max_model_len)
        return ModelCard(self._config.model_name, (self._config.engine.model,), longest, self._created)

    async def submit(self, requests: Sequence[Request]) -> list[Stream]:
        streams = await self._frontend.submit(requests)
        _received.increase(len(requests))
        return streams

    def ready(self) -> bool:
        return self._frontend.num_instances > 0

    async def status(self) -> dict[str, Any]:
        ingress = {
            "ingress_id": self._frontend.ingress_id,
            "streams": self._frontend.num_streams,
            "instances": self._frontend.num_instances,
        }
        model = {"name": self.card.name, "max_model_len": self.card.max_model_len}
        return to_json(await self._scheduler.call("status")) | {"ingress": ingress, "model": model}

    async def history(self, since: float) -> dict[str, Any]:
        return to_json(await self._scheduler.call("history", since))

    async def audit(self) -> dict[str, Any]:
        """Block accounts of every instance."""
        members = await self._scheduler.members(-1)
        audits = {}
        for name, handle in members.instances.items():
            try:
                audits[name] = to_json(await handle.audit.remote())
            except Exception as error:
                audits[name] = {"error": str(error).splitlines()[0]}
        return audits

    async def set_policy(self, dispatch: str | None, migration: bool | None) -> dict[str, Any]:
        return await self._scheduler.call("set_policy", dispatch, migration)

    async def migrate(self, request_id: str, destination: str | None) -> dict[str, Any]:
        places = await self._scheduler.locate([request_id, f"{request_id}-0"])
        known = next((name for name, place in places.items() if place is not None), request_id)
        told = await self._scheduler.call(
            "migrate", known, destination, timeout_s=self._config.scheduler.order_timeout_s + 5
        )
        if isinstance(told, str):
            raise LookupError(told)
        return to_json(told)


class Ingress:
    """Owns the clients' streams and the journals of their requests; see ``frontend`` and ``http_app``."""

    async def __init__(self, config: LlumnixConfig, instances: DeploymentHandle):  # type: ignore[misc]  # Serve awaits it
        from actors.llumnix.engine.loading import load_tokenizer

        self._config = config
        self._instances = instances  # what makes Serve deploy the instances with this ingress
        tokenizer = await asyncio.to_thread(load_tokenizer, config.engine.model)
        self._backend = LiveBackend(config, tokenizer)
        self._backend.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        server = self._config.server
        return build_app(self._backend, HttpLimits(server.max_body_bytes, server.request_timeout_s))

    async def wait_until_ready(self, timeout_s: float) -> bool:
        """Whether at least one instance can be reached within ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while not self._backend.ready() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return self._backend.ready()


IngressDeployment = serve.ingress()(Ingress)
__all__ = ["Ingress", "IngressDeployment", "LiveBackend", "ServiceUnavailable"]
