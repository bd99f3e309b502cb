"""The C4 master of a run: starting, finding and ending it (what it does: ``master_actor``, what it decides: ``master_core``).

master = start_master("run-7", folder=..., ring_folder=...)
ray.get(master.begin_generation.remote(generation))
...
stop_master(master)
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.c4.monitors.master_actor import NAMESPACE, C4Master, MasterSetup
from actors.c4.monitors.master_core import Policy
from actors.c4.monitors.settings import MonitorSettings
from actors.c4.recovery.policy import decide
from actors.cluster.errors import ClusterError

NAME_PREFIX = "c4-master-"
MASTER_NAMESPACE = NAMESPACE


class MonitorError(ClusterError):
    """No master answers, or one of that name is there already; the text is a sentence."""


def start_master(
    run: str,
    settings: MonitorSettings | None = None,
    *,
    folder: Path | str,
    ring_folder: Path | str,
    policy: Policy = decide,
    control_folder: Path | str = "",
) -> Any:
    """The master of a run, owned by the calling process and on its node; call from the driver.

    Args:
        run: names it: ``c4-master-<run>`` in the namespace ``sextant_c4``.
        settings: of the monitors.
        folder: where its state file stands, on this node.
        ring_folder: of the workers' rings, the same path on every node.
        policy: picklable; asked at every tick while a verdict lasts.
        control_folder: of fault injection; ``injection`` in the ring folder when it is not given.

    Raises:
        MonitorError: a master of this run is there already, or it did not start.
    """
    state = Path(folder).absolute() / f"c4-master-{run}.json"
    control_folder = control_folder or Path(ring_folder) / "injection"
    setup = MasterSetup(run, settings or MonitorSettings(), str(ring_folder), str(state), str(control_folder), policy)
    node_id = ray.get_runtime_context().get_node_id()
    actor: Any = ray.remote(C4Master)
    try:
        handle = actor.options(
            name=NAME_PREFIX + run,
            namespace=NAMESPACE,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=1000,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=True),
        ).remote(setup)
        ray.get(handle.pid.remote(), timeout=60)
    except ValueError as error:
        raise MonitorError(f"A C4 master of the run {run} is at work already: give the run another name.") from error
    except (RayActorError, RayTaskError, GetTimeoutError) as error:
        raise MonitorError(f"The C4 master of the run {run} did not start: {str(error).splitlines()[-1]}") from error
    return handle


def stop_master(handle: Any, timeout_s: float = 10.0) -> None:
    """End the agents, the state file and the master."""
    with contextlib.suppress(RayActorError, GetTimeoutError):
        ray.get(handle.stop.remote(), timeout=timeout_s)
    ray.kill(handle)


def find_master(run: str | None = None) -> tuple[str, Any]:
    """(run, handle) of the master of a run, of the only one when no name is given.

    Raises:
        MonitorError: there is none, or several and no name was given.
    """
    from ray.util import list_named_actors

    found = sorted(
        entry["name"].removeprefix(NAME_PREFIX)
        for entry in list_named_actors(all_namespaces=True)
        if entry["namespace"] == NAMESPACE and entry["name"].startswith(NAME_PREFIX)
    )
    if not found:
        raise MonitorError("No training runs under C4 on this cluster.")
    if run is None and len(found) > 1:
        raise MonitorError(f"Several trainings run under C4: name one of {', '.join(found)}.")
    if run is not None and run not in found:
        raise MonitorError(f"No training of the name {run} runs under C4; there is {', '.join(found)}.")
    name = run or found[0]
    return name, ray.get_actor(NAME_PREFIX + name, namespace=NAMESPACE)
