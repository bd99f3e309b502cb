"""Starting and ending a server: checks first what the user may have got wrong, then Ray, then the Serve application."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from actors.cluster.session import ray_session
from apps.llumnix.client import Client, ServerError
from apps.llumnix.config import LlumnixConfig
from apps.program.errors import UserError

READY_TIMEOUT_S = 60.0

SERVE_ENVIRONMENT = {
    # Serve looks after deployment-scoped actors every 10 s by default: too long without a scheduler.
    "RAY_SERVE_DEPLOYMENT_ACTOR_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1",
}


def check_port(host: str, port: int) -> None:
    """Raises UserError when nothing can listen at ``host:port``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"The server cannot listen at {host}:{port} ({(error.strerror or str(error)).lower()}): "
                "stop what uses it or choose another with server.port=N."
            ) from error


def check_model(config: LlumnixConfig) -> None:
    """Raises UserError, in a sentence, when the model cannot be found or its description or tokenizer cannot be read."""
    from actors.llumnix.engine.loading import ModelLoadError, load_tokenizer, read_model_config

    try:
        read_model_config(config.engine.model)
        load_tokenizer(config.engine.model)
    except ModelLoadError as error:
        raise UserError(f"The model cannot be used: {error}.") from error


@contextlib.contextmanager
def running_service(config: LlumnixConfig, quiet: bool = True) -> Iterator[str]:
    """A server for the length of the ``with``; yields its base URL. Started on the Ray that is there or on a new one.

    Raises UserError (port in use, no such model, Serve already running, deployment failed) and ClusterError.
    """
    check_port(config.server.host, config.server.port)
    check_model(config)
    for name, value in SERVE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with ray_session(config.ray):
        from ray import serve

        if quiet:
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
        _start_serve(serve, config)
        try:
            _deploy(serve, config)
            yield config.url
        finally:
            _stop_serve(serve)


def _start_serve(serve: Any, config: LlumnixConfig) -> None:
    """Start Serve's controller and proxy. One that runs already has its own port and is not ours to end."""
    if serve.status().proxies:
        raise UserError(
            "Ray Serve already runs on this cluster: add the application to it with "
            "'serve deploy configs/llumnix/serve.yaml', or end it with 'serve shutdown' first."
        )
    serve.start(
        http_options={"host": config.server.host, "port": config.server.port, "request_timeout_s": None},
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        controller_options={"runtime_env": {"env_vars": SERVE_ENVIRONMENT}},
    )


def _deploy(serve: Any, config: LlumnixConfig) -> None:
    from apps.llumnix.graph import application

    try:
        serve.run(application(config), name=config.app_name, route_prefix="/")
    except RuntimeError as error:
        raise UserError(f"The application could not be deployed: {_reason(serve, config, error)}") from error
    deadline = time.monotonic() + READY_TIMEOUT_S
    with Client(config.url) as client:
        while True:
            with contextlib.suppress(ServerError):
                client.health()
                return
            if time.monotonic() > deadline:
                raise UserError(f"The server at {config.url} did not become ready within {READY_TIMEOUT_S:g} s.")
            time.sleep(0.2)


def _reason(serve: Any, config: LlumnixConfig, error: Exception) -> str:
    """The last line of the deployment's own message: Serve's exception only says that it failed."""
    with contextlib.suppress(Exception):
        app = serve.status().applications[config.app_name]
        for deployment in app.deployments.values():
            lines = [line.strip() for line in deployment.message.splitlines() if line.strip()]
            if lines and "Error" in deployment.message:
                return next((line for line in reversed(lines) if "Error" in line), lines[-1])
    return str(error).strip().splitlines()[0]


def _stop_serve(serve: Any) -> None:
    try:
        serve.shutdown()
    except Exception as error:
        logging.getLogger("sextant.llumnix").warning("the server did not end cleanly: %s", error)
