"""An ordinary HTTP client of a running server: chat, replay, status and the demo go through it, as anybody's program would."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

import httpx

from apps.program.errors import UserError

_LONG = httpx.Timeout(10.0, read=None)


class ServerError(UserError):
    """The server refused or failed; the text is its sentence."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class Client:
    """Calls one server. Raises ServerError with the server's own sentence, or one that says that it cannot be reached."""

    def __init__(self, url: str, timeout: httpx.Timeout = _LONG):
        self.url = url.rstrip("/")
        self._http = httpx.Client(base_url=self.url, timeout=timeout, trust_env=False)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def model(self) -> str:
        """Name of the model that is served."""
        return self._get("/v1/models")["data"][0]["id"]

    def health(self) -> None:
        """Raises ServerError unless at least one instance is ready."""
        self._get("/health")

    def status(self) -> dict[str, Any]:
        """Instances, loads, requests, migrations."""
        return self._get("/sextant/status")

    def history(self, since: float = 0.0) -> dict[str, Any]:
        """Migrations, placements and load samples after ``since`` (seconds since the epoch)."""
        return self._get("/sextant/history", since=since)

    def audit(self) -> dict[str, Any]:
        """Block accounts of every instance."""
        return self._get("/sextant/audit")

    def migrate(self, request_id: str, destination: str | None = None) -> dict[str, Any]:
        """Move a running request live; waits for the end and returns its record."""
        return self._post("/sextant/migrate", {"request_id": request_id, "destination": destination})

    def set_policy(self, dispatch: str | None = None, migration: bool | None = None) -> dict[str, Any]:
        """Change the dispatch policy, switch periodic migration on or off."""
        return self._post("/sextant/policy", {"dispatch": dispatch, "migration": migration})

    def complete(self, path: str, **body: Any) -> dict[str, Any]:
        """POST ``/v1/<path>`` without streaming."""
        return self._post(f"/v1/{path}", body)

    def stream(self, path: str, **body: Any) -> Generator[dict[str, Any], None, None]:
        """POST ``/v1/<path>`` with streaming: the payload of each event as it comes. Closing the iterator aborts."""
        try:
            with self._http.stream("POST", f"/v1/{path}", json=body | {"stream": True}) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refusal(response)
                for line in response.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    payload = json.loads(line.removeprefix("data: "))
                    if "error" in payload:
                        raise ServerError(payload["error"]["message"])
                    yield payload
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _get(self, path: str, **query: Any) -> Any:
        return self._checked("GET", path, params=query)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._checked("POST", path, json=body)

    def _checked(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            raise _refusal(response)
        return response.json()

    def _unreachable(self, error: httpx.HTTPError) -> ServerError:
        return ServerError(
            f"The server at {self.url} cannot be reached ({type(error).__name__}); "
            "start one with: python -m apps.llumnix serve"
        )


def _refusal(response: httpx.Response) -> ServerError:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"The server answered {response.status_code}: {response.text[:200]}"
    return ServerError(message, response.status_code)
