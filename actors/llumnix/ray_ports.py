"""The ports over Ray: calls of engine actors and of the scheduler, with handles resolved anew when they go stale."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayTaskError,
    TaskCancelledError,
)

from actors.llumnix.engine.request import Request, TokenChunk
from actors.llumnix.ports import DispatchRequest, InstanceDied, Membership, Placement, Refusal, ServiceUnavailable
from actors.llumnix.serve_door import find_actor
from actors.llumnix.settings import SchedulerAddress

_GONE = (RayActorError, ActorUnavailableError, TaskCancelledError)


class RayInstance:
    """InstancePort over an engine actor's handle."""

    def __init__(self, handle: Any, call_timeout_s: float = 60.0):
        self._handle, self._timeout = handle, call_timeout_s

    async def add_request(self, request: Request) -> Refusal | None:
        return await self._call(self._handle.add_request.remote(request))

    async def collect(self, ingress_id: str, ack: int) -> tuple[int, Sequence[TokenChunk]]:
        return await self._call(self._handle.collect.remote(ingress_id, ack))

    async def abort(self, request_id: str, up_to_epoch: int | None) -> bool:
        return await self._call(self._handle.abort.remote(request_id, up_to_epoch))

    async def _call(self, reference: Any) -> Any:
        try:
            return await asyncio.wait_for(_result(reference), self._timeout)
        except _GONE as error:
            raise InstanceDied(_first_line(error)) from error
        except TimeoutError as error:
            raise InstanceDied(f"no answer within {self._timeout:g} s") from error
        except RayTaskError as error:  # the engine has stopped, or the poll contradicts its outbox
            raise InstanceDied(_first_line(error.cause if isinstance(error.cause, Exception) else error)) from error


class RayScheduler:
    """SchedulerPort over the scheduler actor, wherever it is now. Also used by instances (register, push_load, reclaim)."""

    def __init__(self, address: SchedulerAddress, call_timeout_s: float = 10.0):
        self._address, self._timeout = address, call_timeout_s
        self._handle: Any = None
        self._resolving = asyncio.Lock()

    async def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        """Call the scheduler once; on a stale handle look for its successor once. Raises ServiceUnavailable."""
        for attempt in (1, 2):
            handle = await self._resolve()
            try:
                reference = getattr(handle, method).remote(*arguments)
                return await asyncio.wait_for(_result(reference), timeout_s or self._timeout)
            except _GONE as error:
                if self._handle is handle:
                    self._handle = None
                if attempt == 2:
                    raise ServiceUnavailable(f"The scheduler died: {_first_line(error)}") from error
            except (TimeoutError, GetTimeoutError) as error:
                raise ServiceUnavailable(f"The scheduler did not answer {method} in time.") from error
        raise AssertionError("unreachable")

    async def _resolve(self) -> Any:
        async with self._resolving:
            if self._handle is None:
                self._handle = await asyncio.to_thread(find_actor, self._address)
            if self._handle is None:
                raise ServiceUnavailable("There is no scheduler at present.")
            return self._handle

    async def refresh(self) -> None:
        """Look again which scheduler is the newest (a rollout starts a second one before it ends the first)."""
        handle = await asyncio.to_thread(find_actor, self._address)
        if handle is not None:
            self._handle = handle

    async def dispatch(self, request: DispatchRequest) -> Placement:
        placement = await self.call("dispatch", request)
        if isinstance(placement, str):
            raise ServiceUnavailable(f"The request cannot be placed: {placement}.")
        return placement

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self.call("abort", list(request_ids))

    async def finished(self, request_ids: Sequence[str]) -> None:
        await self.call("finished", list(request_ids))

    async def locate(self, request_ids: Sequence[str]) -> Mapping[str, str | None]:
        return await self.call("locate", list(request_ids))

    async def members(self, known_version: int) -> Membership:
        return await self.call("members", known_version, timeout_s=60.0)


async def _result(reference: Any) -> Any:
    return await reference


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
