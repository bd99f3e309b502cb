"""The door to Ray's worker pool: asks a node's raylet for idle worker processes that have done their imports.

An actor with the same runtime environment then starts in one of them in about 0.1 s instead of seconds. Ray's own GPU and
resource accounting stays as it is, because the process is leased like any other. When a new Ray has moved the call, training
works as before, only restarts are slower: one warning says so.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from actors.c4.recovery.placement import workers_that_fit
from actors.cluster.ray_private import authentication_token

logger = logging.getLogger(__name__)

HOOK_VARIABLE = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
"""Ray runs the function that this names at the start of a worker process (``worker_process_setup_hook`` of a job)."""
_KEEP_ALIVE_S = 7 * 24 * 3600


class WarmProcesses:
    """Warm processes of one run, held by its controller. ``per_worker``: resources of a training worker."""

    def __init__(self, per_worker: Mapping[str, float]):
        self._per_worker = per_worker
        self._warm: Counter[str] = Counter()
        self._most_on_a_node = 1
        self._serialized = ""
        self._broken = False

    @property
    def knows_environment(self) -> bool:
        return bool(self._serialized)

    def environment(self, serialized: str) -> None:
        """The training workers' runtime environment as one of them wrote it (``own_environment``)."""
        self._serialized = serialized

    def used(self, nodes: Sequence[str]) -> None:
        """A generation's workers were placed: a node id each."""
        counts = Counter(nodes)
        self._most_on_a_node = max(self._most_on_a_node, *counts.values())
        for node, count in counts.items():
            self._warm[node] = max(0, self._warm[node] - count)

    def fill(self) -> None:
        """Orders what is missing on every live node that can hold workers."""
        if self._broken or not self._serialized:
            return
        try:
            for node in ray.nodes():
                if not node["Alive"]:
                    self._warm.pop(node["NodeID"], None)
                    continue
                fits = min(self._most_on_a_node, workers_that_fit(node["Resources"], self._per_worker))
                missing = fits - self._warm[node["NodeID"]]
                if missing > 0:
                    prestart(node, missing, self._serialized)
                    self._warm[node["NodeID"]] += missing
                    logger.info("%d warm worker processes ordered on node %s.", missing, node["NodeID"][:12])
        except Exception as error:  # a moved internal, a raylet that went meanwhile: restarts are slower, nothing else
            self._broken = isinstance(error, (ImportError, AttributeError, TypeError))
            logger.warning("Warm worker processes cannot be started (%s): restarts will import everything anew.", error)


def prestart(node: Mapping[str, Any], count: int, serialized_runtime_env: str) -> None:
    """Asks the raylet of ``node`` (an entry of ``ray.nodes()``) for idle worker processes."""
    import grpc
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc, runtime_environment_pb2

    info = runtime_environment_pb2.RuntimeEnvInfo(serialized_runtime_env=serialized_runtime_env)  # type: ignore[attr-defined]
    info.runtime_env_config.setup_timeout_seconds = 600
    info.runtime_env_config.eager_install = True
    request = node_manager_pb2.PrestartWorkersRequest(  # type: ignore[attr-defined]
        language=0,  # Python
        num_workers=count,
        runtime_env_info=info,
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        keep_alive_duration_secs=_KEEP_ALIVE_S,
    )
    token = authentication_token()
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=5, metadata=metadata)


def own_environment() -> str:
    """This process's runtime environment as Ray writes it: merged with the job's, and compared as text by the worker pool."""
    from ray._private.worker import global_worker

    environment = global_worker.runtime_env
    return environment if isinstance(environment, str) else ray.get_runtime_context().runtime_env.serialize()
