"""Attaching to the cluster on which a training runs under C4, for the verbs that look at one: they never start a Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from actors.cluster.errors import ClusterError
from actors.cluster.session import RayConfig, ray_session
from apps.program.errors import UserError


@contextlib.contextmanager
def running_job(config: RayConfig, run: str | None) -> Iterator[tuple[str, Any]]:
    """``with running_job(config.ray, run) as (name, master):``.

    Raises:
        UserError: no cluster runs here, or no training of that name under C4 on it.
    """
    here = config.address is None and not os.environ.get("RAY_ADDRESS")
    if here:
        config = dataclasses.replace(config, address="auto")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(ray_session(config))
        except ClusterError as error:
            if here and str(error).startswith("No Ray cluster runs"):
                raise UserError(
                    "No training runs under C4 here: there is no Ray cluster on this host (ray.address=host:port names another)."
                ) from error
            raise
        from actors.c4.monitors.master import find_master

        yield find_master(run)
