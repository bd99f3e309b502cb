"""Starting and attaching: what is started is ended, what is not is left alone, and every failure is a sentence."""

from __future__ import annotations

import os
import re
import socket
import time

import pytest

from actors.cluster import ray_private, session
from actors.cluster.errors import ClusterError
from actors.cluster.session import RayConfig, RaySession, connect, environment, ray_session
from tests.ray_head import RayHead, run_python

ATTACH = """
import os, sys, time
from actors.cluster.session import RayConfig, ray_session
from actors.cluster.errors import ClusterError
began = time.monotonic()
try:
    with ray_session(RayConfig(address=ADDRESS, connect_timeout_s=5)) as session:
        import ray
        @ray.remote(num_cpus=0)
        def deadline():
            return os.environ["RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S"]
        print("attached", session.started, session.address, ray.get(deadline.remote()))
    print("connected after close:", ray.is_initialized())
except ClusterError as error:
    print("refused:", error)
print(f"{time.monotonic() - began:.1f} s", file=sys.stderr)
"""


def attach(address: str | None, environment: dict[str, str]) -> str:
    done = run_python(ATTACH.replace("ADDRESS", repr(address)), environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.cluster
def test_attaching_with_a_token_and_no_mode(ray_head: RayHead) -> None:
    """Ray itself would fail here: it looks at a token only when RAY_AUTH_MODE says so."""
    printed = attach(ray_head.address, ray_head.client_environment(mode=None))
    assert re.search(rf"^attached False \S+:{ray_head.port} 1$", printed, re.MULTILINE)
    assert "connected after close: False" in printed
    assert ray_head.alive(), "leaving must not stop a Ray that was only attached to"


@pytest.mark.cluster
def test_the_address_may_come_from_the_environment(ray_head: RayHead) -> None:
    user = ray_head.client_environment() | {"RAY_ADDRESS": ray_head.address}
    assert re.search(rf"^attached False \S+:{ray_head.port} 1$", attach(None, user), re.MULTILINE)


@pytest.mark.cluster
@pytest.mark.parametrize(("token", "mode"), [("0" * 32, None), (None, None), (None, "token"), ("its own", "disabled")])
def test_a_refused_token_is_a_sentence_at_once(ray_head: RayHead, token: str | None, mode: str | None) -> None:
    began = time.monotonic()
    printed = attach(ray_head.address, ray_head.client_environment(token, mode))
    assert printed.startswith("refused: The Ray cluster at")
    assert "RAY_AUTH_TOKEN" in printed
    assert time.monotonic() - began < 20, "Ray's own client retries a refusal for 20 s"


@pytest.mark.cluster
def test_a_client_with_a_token_attaches_to_a_cluster_without_authentication(
    ray_local: RaySession, ray_head: RayHead
) -> None:
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert f"attached False {ray_local.address}" in attach(ray_local.address, ray_head.client_environment(mode="token"))


@pytest.mark.cluster
def test_a_connection_that_exists_is_used_and_kept(ray_local: RaySession) -> None:
    import ray

    with ray_session(RayConfig(address="127.0.0.1:1")) as inner:
        assert inner.address == ray_local.address
        assert not inner.started
    assert ray.is_initialized()
    assert ray_local.started


@pytest.mark.cluster
@pytest.mark.slow
def test_a_ray_of_ones_own_is_ended() -> None:
    code = """
import psutil
from actors.cluster.session import RayConfig, ray_session
with ray_session(RayConfig(address="local", num_cpus=3, namespace="mine", object_store_memory_mib=128)) as session:
    import ray
    assert ray.cluster_resources()["CPU"] == 3
    running = psutil.Process().children(recursive=True)
    print("started", session.started, session.namespace, any("raylet" in process.name() for process in running))
gone, alive = psutil.wait_procs(running, timeout=20)
print("left", [process.name() for process in alive])
"""
    done = run_python(code, {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "started True mine True\nleft []\n"


def test_an_unreachable_address_is_a_sentence() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ClusterError, match=rf"No Ray cluster answers at {address} \(Connection refused\)"):
            session._attach(RayConfig(), address)


@pytest.mark.parametrize("address", ["nonsense", "host:", ":6379", "host:99999", "127.0.0.1:http"])
def test_a_malformed_address_is_a_sentence(address: str) -> None:
    with pytest.raises(ClusterError, match="not of the form host:port"):
        session._attach(RayConfig(), address)


def test_something_else_at_the_address_is_a_sentence() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ClusterError, match="does not answer like the head of a Ray cluster"):
            session._attach(RayConfig(connect_timeout_s=0.5), address)


def test_another_version_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_private, "probe", lambda *_: ray_private.Probe("ok", ray_version="2.9.0"))
    with pytest.raises(ClusterError, match=r"runs Ray 2\.9\.0, this program Ray 2\.60\.0"):
        session._check("127.0.0.1:1", 1)


def test_where_to_attach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configured, else RAY_ADDRESS, else what `ray start` left on this host if it answers, else nothing: start one."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as running:
        running.bind(("127.0.0.1", 0))
        running.listen()
        address = f"127.0.0.1:{running.getsockname()[1]}"
        monkeypatch.setattr(ray_private, "address_of_running_cluster", lambda: address)
        assert session._address(RayConfig()) == address
        assert session._address(RayConfig(address="auto")) == address
        assert session._address(RayConfig(address="local")) is None
        assert session._address(RayConfig(address="a:1")) == "a:1"
        monkeypatch.setenv("RAY_ADDRESS", "b:2")
        assert session._address(RayConfig()) == "b:2"
        assert session._address(RayConfig(address="a:1")) == "a:1"
        monkeypatch.delenv("RAY_ADDRESS")
    assert session._address(RayConfig()) is None, "the address file of a crashed cluster is no cluster"
    with pytest.raises(ClusterError, match="No Ray cluster runs on this host"):
        session._address(RayConfig(address="auto"))


def test_ray_that_does_not_start_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def fail(**_: object) -> None:
        raise RuntimeError("The object store cannot be made.\nMore lines.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(ClusterError, match=r"^Ray could not be started: The object store cannot be made\.$"):
        connect(RayConfig(address="local"))


def test_in_a_job_only_what_the_job_lacks_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray refuses a runtime environment that gives a key of the job's again."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    given = '{"runtime_env": {"working_dir": "gcs://x.zip", "env_vars": {"RAY_USAGE_STATS_ENABLED": "1"}}}'
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", given)
    made = session._runtime_env(RayConfig(working_dir="."))
    assert "working_dir" not in made
    assert set(made["env_vars"]) == set(environment()) - {"RAY_USAGE_STATS_ENABLED"}
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert session._runtime_env(RayConfig(working_dir="."))["working_dir"] == "."


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "7")
    monkeypatch.setattr(session, "_start", lambda _: None)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    connect(RayConfig(address="local"))
    assert os.environ["RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S"] == "7"


def test_ray_still_has_the_private_parts_that_are_used() -> None:
    """Fails with a sentence when a new Ray moves them; then actors/cluster/ray_private.py is to be adapted."""
    ray_private.address_of_running_cluster()
    ray_private.refresh_authentication()
    assert ray_private.probe("127.0.0.1:1", 1).outcome == "unreachable"
