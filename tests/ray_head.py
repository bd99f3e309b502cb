"""A Ray cluster begun by ``ray start --head``, as on a real machine, with a token, for tests; ends its own processes alone."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class RayHead:
    address: str
    """host:port of the GCS."""
    dashboard: str
    token: str
    processes: tuple[psutil.Process, ...]

    @property
    def port(self) -> str:
        """Ray replaces a loopback address by the host's own; the port stays."""
        return self.address.rpartition(":")[2]

    def client_environment(self, token: str | None = "its own", mode: str | None = None) -> dict[str, str]:
        """The environment of a user who has ``token`` (None: none at all) and set RAY_AUTH_MODE to ``mode`` (None: not)."""
        environment = _clean_environment()
        if token is not None:
            environment["RAY_AUTH_TOKEN"] = self.token if token == "its own" else token
        if mode is not None:
            environment["RAY_AUTH_MODE"] = mode
        return environment

    def alive(self) -> bool:
        return all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in self.processes)


@contextlib.contextmanager
def ray_head(num_cpus: int = 4) -> Iterator[RayHead]:
    """Starts a head node with dashboard and jobs on free ports, in a temporary folder of its own."""
    token = secrets.token_hex(16)
    folder = tempfile.mkdtemp(prefix="sx")  # short: sockets' paths may have 107 characters
    port, dashboard, client, agent = _free_ports(4)
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder}", f"--num-cpus={num_cpus}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
    ]
    environment = _clean_environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    log = Path(folder, "start.log")
    with log.open("wb") as output:
        main = psutil.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        _wait_until(lambda: _answers(port) and _answers(dashboard), main, log)
        yield RayHead(
            f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", token, (main, *main.children(recursive=True))
        )
    finally:
        end_processes([*_descendants(main), main])
        shutil.rmtree(folder, ignore_errors=True)


def end_processes(processes: Sequence[psutil.Process]) -> None:
    """Asks them to end, and after five seconds makes them."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=5)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


def run_python(code: str, environment: dict[str, str], timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` from the repository's root in a process of its own."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout_s)


def _clean_environment() -> dict[str, str]:
    """This one without Ray's settings, and with a home that holds no token."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HOME": str(REPOSITORY / "no-such-home")}
    return environment


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _wait_until(ready, main: psutil.Popen, log: Path) -> None:
    deadline = time.monotonic() + 90
    while not ready():
        if main.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"ray start did not come up:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.2)


def _descendants(main: psutil.Popen) -> list[psutil.Process]:
    try:
        return main.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
