"""The OpenAI-compatible HTTP application over any ``Backend``: routes, streams, error objects. Knows neither Ray nor Serve."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException

from actors.llumnix.engine.request import Request as EngineRequest
from actors.llumnix.engine.request import RequestError
from actors.llumnix.frontend import GenerationFailed, ServiceUnavailable, Stream
from actors.llumnix.policy.dispatch import DispatchName
from apps.llumnix.generation import Generation, ModelCard, PromptTokenizer, plan_chat, plan_completion
from apps.llumnix.openai_api import ApiError, ChatBody, CompletionBody, validation_error
from apps.llumnix.openai_responses import DONE, Choice, ResponseBuilder, event, usage

logger = logging.getLogger("sextant.llumnix.ingress")
BodyModel = TypeVar("BodyModel", bound=BaseModel)


@dataclass(frozen=True)
class HttpLimits:
    """What a client may ask of the server."""

    max_body_bytes: int = 4 * 2**20
    request_timeout_s: float = 600.0
    """Longest life of one request, from its arrival to its last token."""


class Backend(Protocol):
    """What stands behind the front door."""

    @property
    def card(self) -> ModelCard:
        """The model that is served, as it is now."""

    @property
    def tokenizer(self) -> PromptTokenizer: ...

    async def submit(self, requests: Sequence[EngineRequest]) -> list[Stream]:
        """Start requests that share a prompt; raises RequestError or ServiceUnavailable."""

    def ready(self) -> bool:
        """Whether a request could be served now."""

    async def status(self) -> dict[str, Any]: ...
    async def migrate(self, request_id: str, destination: str | None) -> dict[str, Any]:
        """Order one live migration and wait for its report; raises LookupError with a sentence."""

    async def history(self, since: float) -> dict[str, Any]: ...
    async def audit(self) -> dict[str, Any]: ...
    async def set_policy(self, dispatch: str | None, migration: bool | None) -> dict[str, Any]: ...


class MigrateBody(BaseModel):
    """POST /sextant/migrate: move ``request_id`` (an API response's id serves as its first choice's) live."""

    model_config = ConfigDict(extra="forbid", strict=True)

    request_id: str
    destination: str | None = None
    """Instance id; the freest other instance when absent."""


class PolicyBody(BaseModel):
    """POST /sextant/policy: change how requests are dispatched, switch periodic migration on or off."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dispatch: DispatchName | None = None
    migration: bool | None = None


def build_app(backend: Backend, limits: HttpLimits) -> FastAPI:
    """The FastAPI application over ``backend``."""
    app = FastAPI(title="Sextant Llumnix", description="OpenAI-compatible serving with live migration.")
    _install_error_handlers(app)

    async def body_of(request: Request, model: type[BodyModel]) -> BodyModel:
        raw = await _bounded_body(request, limits.max_body_bytes)
        try:
            return model.model_validate_json(raw)
        except ValidationError as error:
            raise validation_error(error) from None

    @app.get("/health")
    async def health() -> Response:
        if not backend.ready():
            raise ApiError("No instance is ready.", status=503, kind="service_unavailable")
        return JSONResponse({"status": "ok"})

    def model_object() -> dict[str, Any]:
        card = backend.card
        return {
            "id": card.name,
            "object": "model",
            "created": card.created,
            "owned_by": "sextant",
            "max_model_len": card.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model_object()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        backend.card.check(name)
        return JSONResponse(model_object())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await body_of(request, CompletionBody)
        return await _respond(backend, limits, body, await plan_completion(body, backend.card, backend.tokenizer))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await body_of(request, ChatBody)
        return await _respond(backend, limits, body, await plan_chat(body, backend.card, backend.tokenizer))

    @app.get("/sextant/status")
    async def status() -> Response:
        return JSONResponse(await backend.status())

    @app.post("/sextant/migrate")
    async def migrate(request: Request) -> Response:
        body = await body_of(request, MigrateBody)
        try:
            return JSONResponse(await backend.migrate(body.request_id, body.destination))
        except LookupError as error:
            raise ApiError(str(error.args[0]), status=404, param="request_id", code="not_found") from error

    @app.get("/sextant/history")
    async def history(request: Request) -> Response:
        since = request.query_params.get("since", "0")
        try:
            return JSONResponse(await backend.history(float(since)))
        except ValueError:
            raise ApiError("since must be a time in seconds since the epoch.", param="since") from None

    @app.get("/sextant/audit")
    async def audit() -> Response:
        return JSONResponse(await backend.audit())

    @app.post("/sextant/policy")
    async def policy(request: Request) -> Response:
        body = await body_of(request, PolicyBody)
        return JSONResponse(await backend.set_policy(body.dispatch, body.migration))

    return app


async def _bounded_body(request: Request, limit: int) -> bytes:
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > limit:
            raise ApiError(f"The request body is larger than {limit} bytes.", status=413, code="body_too_large")
    return bytes(raw)


async def _respond(
    backend: Backend, limits: HttpLimits, body: CompletionBody | ChatBody, generation: Generation
) -> Response:
    chat = isinstance(body, ChatBody)
    builder = ResponseBuilder(
        generation.response_id,
        generation.created,
        backend.card.name,
        chat,
        backend.tokenizer,
        logprobs=generation.requests[0].sampling.logprobs is not None,
    )
    deadline = asyncio.get_running_loop().time() + limits.request_timeout_s
    streams: list[Stream] = []

    def close() -> None:
        for stream in streams:
            stream.close()

    try:
        for first in range(0, len(generation.requests), generation.group_size):
            streams += await backend.submit(generation.requests[first : first + generation.group_size])
        choices = [
            Choice(i, echo, prompt_tokens=len(request.prompt_token_ids))
            for i, (request, echo) in enumerate(zip(generation.requests, generation.echoes, strict=True))
        ]
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(_events(generation, builder, choices, streams, deadline, include_usage), close)
        async for index, delta in _merged(streams, deadline):
            choices[index].add(delta)
        return JSONResponse(builder.whole(choices, _usage(generation, choices)))
    except BaseException:
        close()
        raise


class EventStream(StreamingResponse):
    """Server-sent events; ``on_close`` runs however the stream ends: done, client gone, or cancelled in any await."""

    def __init__(self, events: AsyncIterator[bytes], on_close: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._on_close = on_close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


async def _events(
    generation: Generation,
    builder: ResponseBuilder,
    choices: list[Choice],
    streams: list[Stream],
    deadline: float,
    include_usage: bool,
) -> AsyncIterator[bytes]:
    """The events of a streamed response. A failure becomes an event with an error object, as at OpenAI."""
    try:
        for choice in choices:
            opening = builder.opening(choice.index, choice.text)
            if opening is not None:
                yield event(opening)
        async for index, delta in _merged(streams, deadline):
            choices[index].add(delta)
            if delta.text or delta.token_ids or delta.finish_reason:
                yield event(builder.delta(index, delta))
        if include_usage:
            yield event(builder.usage_event(_usage(generation, choices)))
    except Exception as error:
        yield event(as_api_error(error).body())
    yield DONE


async def _merged(streams: list[Stream], deadline: float) -> AsyncIterator[tuple[int, Any]]:
    """Deltas of all streams as they come; raises ApiError at ``deadline`` (of the loop's clock) and on a failure."""
    timeout = ApiError("The request took longer than the server allows.", status=504, kind="timeout", code="timeout")
    loop = asyncio.get_running_loop()
    waiting: dict[asyncio.Task[Any], int] = {}

    def wait_for(index: int) -> None:
        waiting[loop.create_task(anext(streams[index], None))] = index  # type: ignore[arg-type]

    try:
        if len(streams) == 1:  # the common case needs no tasks
            while True:
                async with asyncio.timeout_at(deadline):
                    delta = await anext(streams[0], None)
                if delta is None:
                    return
                yield 0, delta
        for index in range(len(streams)):
            wait_for(index)
        while waiting:
            done, _ = await asyncio.wait(
                waiting, timeout=max(deadline - loop.time(), 0), return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                raise timeout
            for task in done:
                index = waiting.pop(task)
                delta = task.result()
                if delta is not None:
                    wait_for(index)
                    yield index, delta
    except TimeoutError:
        raise timeout from None
    finally:
        for task in waiting:
            task.cancel()


def _usage(generation: Generation, choices: list[Choice]) -> dict[str, Any]:
    cached = sum(choice.cached_tokens for choice in choices[:: generation.group_size])
    return usage(generation.prompt_tokens, sum(choice.num_tokens for choice in choices), cached)


def as_api_error(error: Exception) -> ApiError:
    """Any failure as an error object; what nobody foresaw is logged with its traceback and told without details."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(str(error), param=error.param)
        case ServiceUnavailable():
            return ApiError(str(error), status=503, kind="service_unavailable", code="no_instance")
        case GenerationFailed():
            return ApiError(str(error), status=500, kind="server_error", code="generation_failed")
        case HTTPException():
            return _http_error(error)
    logger.error("unexpected error while serving a request", exc_info=error)
    return ApiError(
        "The server failed while it served this request; its log says why.", status=500, kind="server_error"
    )


def _http_error(error: HTTPException) -> ApiError:
    told = {404: "There is no such path.", 405: "This path does not accept this HTTP method."}
    detail = told.get(error.status_code) or (
        error.detail if isinstance(error.detail, str) else json.dumps(error.detail)
    )
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return ApiError(detail, status=error.status_code, kind=kind)


def _install_error_handlers(app: FastAPI) -> None:
    async def handle(request: Request, error: Exception) -> Response:
        told = as_api_error(error)
        headers = {"Retry-After": "1"} if told.status == 503 else dict(getattr(error, "headers", None) or {})
        return JSONResponse(told.body(), status_code=told.status, headers=headers)

    for kind in (ApiError, RequestError, ServiceUnavailable, GenerationFailed, HTTPException, Exception):
        app.add_exception_handler(kind, handle)
