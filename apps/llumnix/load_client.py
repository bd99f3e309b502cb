"""The load generator's side of HTTP: many event streams at once, no limit on connections, little work per event."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from apps.llumnix.client import ServerError
from apps.program.errors import UserError


def open_client(url: str, timeout_s: float = 600.0) -> httpx.AsyncClient:
    """A client without a limit on connections: an open-loop load must never wait for a free one.

    ``timeout_s`` is the longest silence in a stream.

    Raises:
        UserError: ``url`` is no http(s) address.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"The address {url!r} must begin with http:// or https://.")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    timeout = httpx.Timeout(timeout_s, connect=10.0, pool=None)
    # Proxies of the environment are for the world outside; a load generator talks to the address it was given.
    return httpx.AsyncClient(base_url=url.rstrip("/"), timeout=timeout, limits=limits, trust_env=False)


async def stream_events(client: httpx.AsyncClient, path: str, body: bytes) -> AsyncIterator[dict[str, Any]]:
    """Posts ``body`` (JSON) and yields each server-sent event's object until the stream's end mark.

    Raises:
        ServerError: the server cannot be reached, refuses, sends an error event, or breaks the stream off.
    """
    try:
        async with client.stream("POST", path, content=body, headers={"Content-Type": "application/json"}) as answer:
            if answer.status_code != 200:
                raise _refusal(answer.status_code, await answer.aread())
            async for line in answer.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise ServerError(_message(event))
                yield event
    except httpx.TimeoutException as error:
        raise ServerError(f"No answer in time ({type(error).__name__}).") from error
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        raise ServerError(f"The connection failed: {error or type(error).__name__}.") from error
    raise ServerError("The stream broke off before its end mark.")


async def served_model(client: httpx.AsyncClient) -> tuple[str, int]:
    """(name, longest prompt + output in tokens) of the model that the server serves; raises ServerError."""
    try:
        answer = await client.get("/v1/models")
        if answer.status_code != 200:
            raise _refusal(answer.status_code, answer.content)
        models = answer.json()["data"]
        return models[0]["id"], int(models[0].get("max_model_len") or 2048)
    except httpx.HTTPError as error:
        raise ServerError(
            f"The server at {client.base_url} cannot be reached ({type(error).__name__}); "
            "start one with: python -m apps.llumnix serve"
        ) from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ServerError(f"{client.base_url} is no OpenAI-compatible server with a model.") from error


def _refusal(status: int, content: bytes) -> ServerError:
    try:
        return ServerError(_message(json.loads(content)), status)
    except ValueError:
        return ServerError(f"The server answered with HTTP status {status}.", status)


def _message(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message") if isinstance(error, dict) else error or body)
