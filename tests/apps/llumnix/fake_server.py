"""A tiny OpenAI-shaped server on a thread: two slot-limited "instances" that emit a token a step; it records what it is asked.

Stands in for the real graph in tests of the load generator: its timing is known, so that what the client measures can be checked.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


class FakeServer:
    """See the module. ``step_s``: pause before each token; ``slots``: requests that each instance runs at once;
    ``hold_until``: nothing is answered before so many requests have come."""

    def __init__(
        self,
        step_s: float = 0.005,
        slots: int = 4,
        fail_every: int = 0,
        sextant: bool = True,
        cut_every: int = 0,
        hold_until: int = 0,
    ):
        self.step_s, self.fail_every, self.cut_every = step_s, fail_every, cut_every
        self.bodies: list[dict[str, Any]] = []
        self.received_at: list[float] = []
        self.placements: list[dict[str, Any]] = []
        self.migrations: list[dict[str, Any]] = []
        self.slots = slots
        self.hold_until = hold_until
        self._enough = asyncio.Event()
        self._semaphores: dict[str, asyncio.Semaphore] = {}
        routes = [Route("/v1/models", self.models), Route("/v1/completions", self.completions, methods=["POST"])]
        if sextant:
            routes += [Route("/sextant/status", self.status), Route("/sextant/history", self.history)]
        self.app = Starlette(routes=routes)

    async def models(self, _: Request) -> Response:
        return JSONResponse({"data": [{"id": "fake", "max_model_len": 1024}]})

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        number = len(self.bodies)
        self.bodies.append(body)
        self.received_at.append(time.perf_counter())
        if self.fail_every and number % self.fail_every == self.fail_every - 1:
            error = {"message": "No instance is ready.", "type": "service_unavailable", "param": None, "code": None}
            return JSONResponse({"error": error}, status_code=503)
        return StreamingResponse(self._stream(number, body), media_type="text/event-stream")

    async def _stream(self, number: int, body: dict[str, Any]) -> Any:
        name, request_id = f"replica-{number % 2}", f"cmpl-{number}"
        if len(self.bodies) >= self.hold_until:
            self._enough.set()
        await self._enough.wait()
        slots = self._semaphores.setdefault(name, asyncio.Semaphore(self.slots))
        self._place(request_id, name, "dispatch")
        async with slots:
            total = body["max_tokens"]
            for index in range(total):
                await asyncio.sleep(self.step_s)
                if index == total // 2 and number % 3 == 0:
                    self._migrate(request_id, name)
                if self.cut_every and number % self.cut_every == self.cut_every - 1 and index == 1:
                    return
                yield _event({"id": request_id, "choices": [{"index": 0, "text": "x"}]})
        used = {
            "prompt_tokens": len(body["prompt"]),
            "completion_tokens": total,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        yield _event({"id": request_id, "choices": [], "usage": used})
        self._place(request_id, None, "end")
        yield b"data: [DONE]\n\n"

    def _place(self, request_id: str, instance: str | None, cause: str) -> None:
        self.placements.append(
            {"at": time.time(), "request_id": f"{request_id}-0", "instance_id": instance, "cause": cause}
        )

    def _migrate(self, request_id: str, source: str) -> None:
        other = "replica-1" if source == "replica-0" else "replica-0"
        self._place(request_id, other, "migration")
        report = {"outcome": "committed", "downtime_ms": 1.5, "stages": 2, "blocks": 9, "bytes": 9 * 737_280}
        self.migrations.append(
            {"request_id": f"{request_id}-0", "source": source, "destination": other, "ended_at": time.time(),
             "committed": True, "outcome": "committed", "report": report}
        )  # fmt: skip

    async def status(self, _: Request) -> Response:
        counts = {"migrated": len(self.migrations), "migration_failures": 0}
        return JSONResponse(
            {"instances": [{"preemptions": 2 * len(self.bodies)}, {"preemptions": 0}], "counts": counts}
        )

    async def history(self, request: Request) -> Response:
        since = float(request.query_params["since"])
        samples = [
            {"at": since + 0.1 * step, "instance_id": f"replica-{i}", "used_blocks": 10 * step, "total_blocks": 100,
             "running": step, "waiting": i, "freeness": None, "step_ms": 5.0, "preemptions": 0}
            for step in range(5) for i in range(2)
        ]  # fmt: skip
        told = {
            "samples": samples,
            "placements": [one for one in self.placements if one["at"] > since],
            "migrations": [one for one in self.migrations if one["ended_at"] > since],
        }
        return JSONResponse(told)


def _event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


@contextmanager
def serving(server: FakeServer) -> Iterator[str]:
    """Runs ``server`` on a free port of this host; gives its address."""
    runner = uvicorn.Server(uvicorn.Config(server.app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not runner.started:
        if time.monotonic() > deadline:
            raise RuntimeError("the fake server did not start")
        time.sleep(0.01)
    port = runner.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        runner.should_exit = True
        thread.join(10)
