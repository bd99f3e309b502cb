"""Ray's private names that the llumnix actors rely on: fails with a clear sentence when a new Ray moves one."""

from __future__ import annotations

import importlib
import inspect

import pytest

from actors.llumnix import serve_door
from actors.llumnix.serve_door import ServeMovedError, deployment_actor_address, full_actor_name


def test_the_address_matches_the_name_that_serve_gives_a_deployment_scoped_actor():
    address = deployment_actor_address("app", "Ingress")
    name = full_actor_name("app", "Ingress", code_version="v1")
    assert name.startswith(address.prefix) and name.endswith(address.suffix), (
        f"Serve now names deployment-scoped actors {name!r}: actors/llumnix/serve_door.py expects "
        f"{address.prefix}<version>{address.suffix}"
    )
    other = full_actor_name("app", "Ingress2", code_version="v1")
    assert not other.startswith(address.prefix)


def test_serve_still_has_deployment_scoped_actors_and_late_bound_asgi_apps():
    from ray import serve
    from ray.serve.config import DeploymentActorConfig

    assert {"name", "actor_class", "init_kwargs", "actor_options"} <= set(DeploymentActorConfig.model_fields), (
        "Serve's DeploymentActorConfig has lost a field that apps/llumnix/graph.py sets"
    )
    assert "deployment_actors" in inspect.signature(serve.deployment).parameters
    source = inspect.getsource(importlib.import_module("ray.serve.api"))
    assert "__serve_build_asgi_app__" in source, (
        "serve.ingress() no longer takes its app from __serve_build_asgi_app__ (apps/llumnix/ingress.py)"
    )


def test_a_moved_name_is_told_in_a_sentence(monkeypatch):
    constants = importlib.import_module("ray.serve._private.constants")
    monkeypatch.delattr(constants, "SERVE_DEPLOYMENT_ACTOR_PREFIX")
    with pytest.raises(ServeMovedError, match="no longer has .*SERVE_DEPLOYMENT_ACTOR_PREFIX"):
        serve_door.deployment_actor_address("app", "Ingress")
