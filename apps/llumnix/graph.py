"""The Serve graph: Ingress (with the scheduler as its deployment-scoped actor) over Instance replicas.

``build`` is the application builder that configs/llumnix/serve.yaml names, so the app is deployable with ``serve deploy``;
``application`` does the same from a resolved configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.config import DeploymentActorConfig
from ray.serve.schema import LoggingConfig

from actors.llumnix.scheduler import SCHEDULER_OPTIONS, Scheduler
from actors.llumnix.serve_door import SCHEDULER_ACTOR
from apps.llumnix.config import LlumnixConfig
from apps.llumnix.ingress import IngressDeployment
from apps.llumnix.instance_deployment import INGRESS, INSTANCE, Instance
from apps.program.config import load_config
from apps.program.errors import ConfigError


def application(config: LlumnixConfig) -> serve.Application:
    """The bound application of ``config``."""
    instances, server = config.instances, config.server
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    instance = serve.deployment(
        Instance,
        name=INSTANCE,
        num_replicas=instances.count,
        max_ongoing_requests=100,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=instances.health_check_period_s,
        health_check_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=10.0,
        logging_config=quiet,
        max_constructor_retry_count=3,
    )
    scheduler = DeploymentActorConfig(
        name=SCHEDULER_ACTOR,
        actor_class=ray.remote(Scheduler),
        init_kwargs={"settings": config.scheduler},
        actor_options=SCHEDULER_OPTIONS,
    )
    ingress = serve.deployment(
        IngressDeployment,
        name=INGRESS,
        num_replicas=server.ingresses,
        max_ongoing_requests=server.max_ongoing_requests,
        ray_actor_options={"num_cpus": 0},
        deployment_actors=[scheduler],
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=5.0,
        logging_config=quiet,
        max_constructor_retry_count=3,
    )
    return ingress.bind(config, instance.bind(config))  # type: ignore[attr-defined]  # Serve types the decorator form


def build(args: Mapping[str, Any]) -> serve.Application:
    """Application builder for ``serve run`` / ``serve deploy``: args ``preset`` (name or path; default cpu) and
    ``overrides`` (list of ``key=value``, or one string with spaces between them)."""
    unknown = sorted(set(args) - {"preset", "overrides", "app_name"})
    if unknown:
        raise ConfigError(f"The builder of apps.llumnix knows no argument {unknown[0]!r}; allowed: preset, overrides.")
    overrides = args.get("overrides") or []
    if isinstance(overrides, str):
        overrides = overrides.split()
    config = load_config(LlumnixConfig, args.get("preset") or "cpu", list(overrides), system="llumnix")
    return application(config)
