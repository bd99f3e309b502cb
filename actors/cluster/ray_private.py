"""The one door of meeting a cluster to Ray's private parts: the address file, the authentication cache, the liveness call.

Each function fails closed: when a new Ray moves what it uses, it raises ``ClusterError`` with a sentence that says so
(tests/actors/cluster/test_session.py notices first).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from actors.cluster.errors import ClusterError


@dataclass(frozen=True)
class Probe:
    """What the head of a cluster answered: ``ok``, ``unauthenticated`` or ``unreachable`` (with the reason)."""

    outcome: str
    ray_version: str = ""
    reason: str = ""


def address_of_running_cluster() -> str | None:
    """``host:port`` that the last ``ray start`` left on this host; it outlives a crash of that cluster."""
    try:
        from ray._private.utils import read_ray_address
    except ImportError as error:
        raise _moved("the file with the running cluster's address") from error
    try:
        return read_ray_address() or None
    except OSError:
        return None


def refresh_authentication() -> None:
    """Makes Ray read RAY_AUTH_MODE again: it caches the mode at import, and this process may have set it since."""
    try:
        from ray._raylet import AuthenticationMode, Config, get_authentication_mode  # type: ignore[attr-defined]
    except ImportError as error:
        raise _moved("the authentication mode") from error
    token_wanted = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    if token_wanted != (get_authentication_mode() == AuthenticationMode.TOKEN):
        Config.initialize("")


def probe(address: str, timeout_s: float) -> Probe:
    """Asks the cluster's head whether it lives, with our token. Ray's own client retries a refusal for 20 s."""
    try:
        import grpc
        from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    except ImportError as error:
        raise _moved("the head's liveness call") from error
    request = gcs_service_pb2.CheckAliveRequest()  # type: ignore[attr-defined]
    token = authentication_token()
    metadata = (("authorization", f"Bearer {token}"),) if token and _token_mode() else ()
    with grpc.insecure_channel(address) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            answer = stub.CheckAlive(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return Probe("unauthenticated", reason=error.details() or "")
            return Probe("unreachable", reason=(error.details() or error.code().name).splitlines()[0])
    return Probe("ok", ray_version=answer.ray_version)


def authentication_token() -> str | None:
    """The token that Ray would use: RAY_AUTH_TOKEN, else the file of RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        file = Path(path) if path else Path.home() / ".ray" / "auth_token"
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError, RuntimeError):
        return None


def _token_mode() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def _moved(what: str) -> ClusterError:
    return ClusterError(
        f"This Ray keeps {what} elsewhere than Ray 2.60 did: actors/cluster/ray_private.py must be adapted."
    )
