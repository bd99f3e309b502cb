"""The one door of the llumnix actors to Ray's and Serve's private parts: the names of deployment-scoped actors.

``serve.get_deployment_actor`` answers only inside a replica of the owning deployment; instances and tests need the scheduler
as well. When a new Ray moves a name, the functions raise ``ServeMovedError`` (tests/actors/llumnix/test_serve_door.py).
"""

from __future__ import annotations

import importlib
import secrets
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from actors.llumnix.settings import SchedulerAddress

SCHEDULER_ACTOR = "scheduler"


class ServeMovedError(RuntimeError):
    """Ray Serve has changed something private that Sextant relies on."""


def _private(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ServeMovedError(
            f"Ray {ray.__version__} no longer has {module}.{name}: actors/llumnix/serve_door.py must learn how Serve "
            "names deployment-scoped actors now."
        ) from error


def deployment_actor_address(app_name: str, deployment: str, actor: str = SCHEDULER_ACTOR) -> SchedulerAddress:
    """Address of a deployment-scoped actor whatever the deployment's code version."""
    prefix = _private("ray.serve._private.constants", "SERVE_DEPLOYMENT_ACTOR_PREFIX")
    namespace = _private("ray.serve._private.constants", "SERVE_NAMESPACE")
    return SchedulerAddress(f"{prefix}{app_name}::{deployment}::", f"::{actor}", namespace)


def full_actor_name(app_name: str, deployment: str, code_version: str, actor: str = SCHEDULER_ACTOR) -> str:
    """The name Serve gives a deployment-scoped actor; used to verify ``deployment_actor_address``."""
    identify = _private("ray.serve._private.common", "DeploymentID")
    name = _private("ray.serve._private.utils", "get_deployment_actor_name")
    return name(identify(name=deployment, app_name=app_name), actor, code_version=code_version)


def shared_secret(name: str, nbytes: int = 32) -> bytes:
    """A random key that every process of this Ray cluster gets alike, and nobody outside: it lives in the cluster's own
    key-value store, behind the cluster's authentication. Blocks on Ray."""
    put = _private("ray.experimental.internal_kv", "_internal_kv_put")
    get = _private("ray.experimental.internal_kv", "_internal_kv_get")
    put(name.encode(), secrets.token_bytes(nbytes), overwrite=False, namespace=b"sextant")
    secret: bytes | None = get(name.encode(), namespace=b"sextant")
    if not secret:
        raise ServeMovedError(f"Ray's key-value store did not keep the secret {name!r}.")
    return secret


def find_actor(address: SchedulerAddress, timeout_s: float = 5.0) -> Any | None:
    """Handle of the live actor at ``address``, None when there is none. Blocks on Ray: call it off the event loop.

    During a rollout two code versions have one each: then the one that started last, by its ``started_at`` method.
    """
    handles = []
    for actor in ray.util.list_named_actors(all_namespaces=True):
        name = actor["name"]
        if actor["namespace"] != address.namespace or not name.startswith(address.prefix):
            continue
        if name.endswith(address.suffix) if address.suffix else name == address.prefix:
            try:
                handles.append(ray.get_actor(name, namespace=address.namespace))
            except ValueError:  # died between the two calls
                continue
    if len(handles) <= 1:
        return handles[0] if handles else None
    started: list[tuple[float, Any]] = []
    for handle in handles:
        try:
            at: Any = ray.get(handle.started_at.remote(), timeout=timeout_s)
            started.append((float(at), handle))
        except (RayActorError, RayError, TimeoutError):
            continue
    return max(started, key=lambda pair: pair[0])[1] if started else None
