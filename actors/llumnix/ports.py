"""What the rooms around the engine ask of one another, as plain async interfaces, and the data that crosses them.

The Ray actors implement them through ``ray_ports``; tests implement them in one process. Nothing here imports Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.llumnix.engine.request import Request, TokenChunk


class InstanceDied(RuntimeError):
    """The instance's process is gone, or cannot be reached."""


class ServiceUnavailable(RuntimeError):
    """Nothing can serve the request now (no instance, no scheduler); the client may try again."""


@dataclass(frozen=True)
class InstanceInfo:
    """What an instance says of itself when it registers; constant over its life."""

    instance_id: str
    node_id: str
    pid: int
    model: str
    numerics: str
    """Fingerprint of model and arithmetic: requests migrate only between instances with equal numerics."""
    max_model_len: int
    block_size: int
    total_blocks: int
    address: bytes | None = None
    """Pickled ``migration.PeerAddress`` at which its migrator listens: opaque to all but instances, so that what it is made of
    (torch, shared memory) stays out of the scheduler's and the ingresses' processes. None: it cannot migrate."""


@dataclass(frozen=True)
class DispatchRequest:
    """What the scheduler needs to know of a request to place it."""

    request_id: str
    ingress_id: str
    tokens: int
    """Prompt tokens, and output tokens when the request goes on from a journal."""
    priority: int
    arrival_time: float
    near: str | None = None
    """A request already placed whose prompt this one shares: the same instance has its blocks in the prefix cache."""
    exclude: tuple[str, ...] = ()
    """Instances known to be dead to the ingress."""


@dataclass(frozen=True)
class Placement:
    instance_id: str
    epoch: int


@dataclass(frozen=True)
class Refusal:
    """Why an instance will never serve a request; the engine's RequestError as data."""

    message: str
    param: str | None = None


@dataclass(frozen=True)
class Membership:
    """Instances that are registered, with handles of the transport in use. ``version`` grows with every change."""

    version: int
    instances: Mapping[str, Any] = field(default_factory=dict)
    infos: Mapping[str, InstanceInfo] = field(default_factory=dict)


class InstancePort(Protocol):
    """One engine actor as the ingress sees it. Every method raises InstanceDied when the process is gone."""

    async def add_request(self, request: Request) -> Refusal | None: ...

    async def collect(self, ingress_id: str, ack: int) -> tuple[int, Sequence[TokenChunk]]:
        """Long-poll: everything not acknowledged up to ``ack``, and the sequence number that acknowledges it."""

    async def abort(self, request_id: str, up_to_epoch: int | None) -> bool: ...


class SchedulerPort(Protocol):
    """The scheduler as the ingress sees it. Methods raise ServiceUnavailable when it cannot be reached in time."""

    async def dispatch(self, request: DispatchRequest) -> Placement: ...

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Drop the requests everywhere, whatever migration of theirs is under way."""

    async def finished(self, request_ids: Sequence[str]) -> None: ...

    async def locate(self, request_ids: Sequence[str]) -> Mapping[str, str | None]:
        """Instance that runs each request (or is handing it over); None when no live instance has it."""

    async def members(self, known_version: int) -> Membership:
        """Long-poll: returns when the membership differs from ``known_version``, or after a while."""
