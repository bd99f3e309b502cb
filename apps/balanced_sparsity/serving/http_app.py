"""The HTTP face of a served LSTM over any ``Streams``: routes, checks of what comes in, errors as sentences. Knows no Ray.

POST   /streams                {"stream": "name"}, or {} for a name of the server's -> 201
POST   /streams/NAME/frames    {"frames": [[...], ...]} -> an output for each
GET    /streams/NAME, /status, /health;  DELETE /streams/NAME
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException

from apps.balanced_sparsity.serving.streams import Opened, Refusal, Stepped, StreamInfo, TableInfo

logger = logging.getLogger("sextant.balanced_sparsity.serving")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_Body = TypeVar("_Body", bound=BaseModel)


class Streams(Protocol):
    """What stands behind the face: a ``StreamTable``, or many of them in processes of their own."""

    async def open(self, stream: str) -> Opened | Refusal: ...
    async def step(self, stream: str, frames: Sequence[Sequence[float]]) -> Stepped | Refusal: ...
    async def status(self, stream: str) -> StreamInfo | Refusal: ...
    async def close(self, stream: str) -> StreamInfo | Refusal: ...
    async def info(self) -> list[TableInfo | Refusal]: ...


class OpenBody(BaseModel):
    """POST /streams."""

    model_config = ConfigDict(extra="forbid", strict=True)

    stream: str | None = None


class FramesBody(BaseModel):
    """POST /streams/NAME/frames."""

    model_config = ConfigDict(extra="forbid", strict=True)

    frames: list[list[float]]


class Refused(Exception):
    """Ends a request with a refusal."""

    def __init__(self, refusal: Refusal):
        super().__init__(refusal.sentence)
        self.refusal = refusal


def build_app(streams: Streams, max_body_bytes: int) -> FastAPI:
    """The application over ``streams``."""
    app = FastAPI(
        title="Sextant balanced LSTM", description="A pruned LSTM, frame by frame; every stream keeps its state."
    )
    _install_error_handlers(app)

    @app.get("/health")
    async def health() -> Response:
        tables = [table for table in await streams.info() if isinstance(table, Refusal)]
        return _answer(tables[0]) if tables else JSONResponse({"status": "ok"})

    @app.get("/status")
    async def status() -> Response:
        tables = await streams.info()
        return JSONResponse(
            {"shards": [{"problem": t.sentence} if isinstance(t, Refusal) else asdict(t) for t in tables]}
        )

    @app.post("/streams")
    async def open_stream(request: Request) -> Response:
        body = await _body(request, OpenBody, max_body_bytes)
        name = uuid.uuid4().hex if body.stream is None else _name(body.stream)
        return _answer(await streams.open(name), 201)

    @app.post("/streams/{name}/frames")
    async def frames(name: str, request: Request) -> Response:
        body = await _body(request, FramesBody, max_body_bytes)
        return _answer(await streams.step(_name(name), body.frames))

    @app.get("/streams/{name}")
    async def stream_status(name: str) -> Response:
        return _answer(await streams.status(_name(name)))

    @app.delete("/streams/{name}")
    async def close_stream(name: str) -> Response:
        return _answer(await streams.close(_name(name)))

    return app


def _name(name: str) -> str:
    if NAME.fullmatch(name) is None:
        raise Refused(
            Refusal(
                400,
                "A stream's name has 1 to 128 letters, digits, dots, dashes and underscores, a letter or digit first.",
            )
        )
    return name


async def _body(request: Request, kind: type[_Body], limit: int) -> _Body:
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > limit:
            raise Refused(Refusal(413, f"The request body is larger than {limit} bytes."))
    try:
        return kind.model_validate_json(bytes(raw) or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Refused(Refusal(400, f"{where or 'The body'}: {first['msg']}.")) from None


def _answer(told: Any, status: int = 200) -> Response:
    if isinstance(told, Refusal):
        headers = {"Retry-After": "1"} if told.status in (429, 503) else None
        return JSONResponse({"error": {"message": told.sentence}}, status_code=told.status, headers=headers)
    return JSONResponse(asdict(told), status_code=status)


def _install_error_handlers(app: FastAPI) -> None:
    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, Refused):
            return _answer(error.refusal)
        if isinstance(error, HTTPException):
            told = {404: "There is no such path.", 405: "This path does not accept this HTTP method."}
            return _answer(Refusal(error.status_code, told.get(error.status_code) or str(error.detail)))
        logger.error("unexpected error while serving a request", exc_info=error)
        return _answer(Refusal(500, "The server failed while it served this request; its log says why."))

    for kind in (Refused, HTTPException, Exception):
        app.add_exception_handler(kind, handle)
