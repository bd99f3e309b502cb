"""A slice for a Ray worker: call ``take_slice`` first thing in an actor or task that asked for the custom resource.

    @ray.remote(resources={"mig_1g_10gb": 1}, num_gpus=0)
    class Worker:
        def __init__(self):
            self.slice = take_slice("mig_1g_10gb")     # sets CUDA_VISIBLE_DEVICES
            import torch                               # only now

Nobody has to give it back: the node's lease actor notices the end of the process, however it ends.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.mig.backends import BackendError, DeviceSlice, InSlice, enter_slice
from actors.mig.lease.actor import ACTOR_OPTIONS, NAMESPACE, BackendSpec, Grant, SliceLeaser

_PATIENCE_S = 60.0


@dataclass(frozen=True)
class WorkerSlice:
    """The slice of this process."""

    number: int
    slice: DeviceSlice
    inside: InSlice
    leaser: Any

    def release(self) -> None:
        """Gives it back before the process ends; the process must not use the device any more.

        Raises:
            BackendError: the lease was over already; SliceVanished: the slice was cut anew under it.
        """
        _get(self.leaser.release.remote(self.number))


def node_leaser(spec: BackendSpec | None = None, node_id: str | None = None) -> Any:
    """The lease actor of a node (default: this one's), started when there is none yet.

    Raises:
        BackendError: the node offers other slices than ``spec``; the backend's own sentence when it cannot start.
    """
    node = node_id or ray.get_runtime_context().get_node_id()
    name = f"leaser-{node}"
    try:
        leaser: Any = ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        # Detached: the slices are the node's, not the job's; another job's table would lease them a second time.
        leaser = ray.remote(SliceLeaser).options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            **ACTOR_OPTIONS,
        ).remote(spec or BackendSpec())  # fmt: skip
    has = _get(leaser.spec.remote())
    if spec is not None and has != spec:
        raise BackendError(
            f"This node's slices are offered as {has}, not as {spec}: end its lease actor ({name}) first."
        )
    return leaser


def take_slice(resource: str, spec: BackendSpec | None = None, leaser: Any = None) -> WorkerSlice:
    """Leases a slice of ``resource`` for this process and enters it.

    Raises:
        BackendError: torch is imported already, or no slice can be had; the sentence says why.
    """
    if "torch" in sys.modules:
        raise BackendError(
            f"The slice {resource} was asked for too late: torch is imported already in this worker, and would not see it. "
            "Call take_slice first, and import torch after it."
        )
    leaser = leaser or node_leaser(spec)
    grant: Grant = _get(leaser.lease.remote(resource, os.getpid(), _who()))
    inside = enter_slice(dict(grant.environment))
    return WorkerSlice(grant.number, grant.slice, inside, leaser)


def _who() -> str:
    context = ray.get_runtime_context()
    return context.get_actor_name() or context.get_task_name() or ""


def _get(reference: Any) -> Any:
    try:
        return ray.get(reference, timeout=_PATIENCE_S)
    except RayTaskError as error:
        if isinstance(error.cause, BackendError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise BackendError(f"This node's lease actor has ended: {_reason(error)}") from error
    except GetTimeoutError as error:
        raise BackendError(f"This node's lease actor did not answer within {_PATIENCE_S:.0f} s.") from error


def _reason(error: BaseException) -> str:
    """The last line that says something: where an actor's constructor failed, that of the backend's error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
