"""A rank of the lab: a process inside a host's namespace that runs ring all-reduces of the ``c4`` group, phase by phase."""

from __future__ import annotations

import ctypes
import os
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

from apps.c4.paths.fabric import enter

LISTEN_PORT = 20_000
_DEATH_SIGNAL = 1


@dataclass(frozen=True)
class Rank:
    """Who a worker is."""

    job: int
    rank: int
    namespace: str


@dataclass(frozen=True)
class Phase:
    """What a worker does next: meet the other rank, over this source port, and reduce until the end or the next phase."""

    number: int
    address: str
    """Where this rank listens: it chooses the plane of the connection that comes in."""
    source_port: int
    store: str
    """A file, the same for both ranks."""
    seconds: float
    bytes: int
    timeout_s: float = 20.0

    @property
    def listen_port(self) -> int:
        return LISTEN_PORT + self.number


@dataclass(frozen=True)
class Reduced:
    """What a worker saw: begin and end of each operation on the machine's monotonic clock."""

    number: int
    ended_s: tuple[float, ...]
    began_s: float


@dataclass(frozen=True)
class Failed:
    number: int
    error: str


def work(me: Rank, pipe: Connection) -> None:
    """Serves phases until None comes or the other end is gone."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)  # no rank outlives the lab
    os.environ["OMP_NUM_THREADS"] = "1"
    number = -1
    try:
        enter(me.namespace)
        os.environ["GLOO_SOCKET_IFNAME"] = "p0"
        import torch

        torch.set_num_threads(1)
        phase: Phase | None = pipe.recv()
        with tempfile.TemporaryDirectory(prefix="sextant-lab-") as folder:
            while phase is not None:
                number = phase.number
                pipe.send(_run(me, phase, pipe, folder))
                phase = pipe.recv()
    except (EOFError, KeyboardInterrupt):
        return
    except BaseException:
        pipe.send(Failed(number, traceback.format_exc()))


def _run(me: Rank, phase: Phase, pipe: Connection, folder: str) -> Reduced:
    import torch
    import torch.distributed as dist

    from actors.c4.recorder.backend import register_backend, start_recording, stop_recording
    from actors.c4.recorder.recorder import RecordingConfig
    from actors.c4.recorder.transport import RingOptions

    _set_port_range(30_000, 40_000)
    options = RingOptions(
        algorithm="rotated", piece_bytes=1 << 16, source_port=lambda source, destination: phase.source_port,
        address=phase.address,
    )  # fmt: skip
    register_backend()
    start_recording(RecordingConfig(f"lab{me.job}", phase.number, me.rank, 2, directory=folder), options)
    dist.init_process_group(
        "c4",
        init_method=f"file://{phase.store}",
        rank=me.rank,
        world_size=2,
        timeout=timedelta(seconds=phase.timeout_s),
    )
    try:
        pipe.send("initialised")
        if pipe.recv() != "meet":
            return Reduced(phase.number, (), time.monotonic())
        # The listener's port is part of the 5-tuple that was traced: a range of one port makes the kernel choose it. Only now:
        # gloo, inside the group, has made its own connections, also those of the other ranks on this host.
        _set_port_range(phase.listen_port, phase.listen_port)
        data = torch.ones(phase.bytes // 4)
        dist.all_reduce(torch.ones(1))
        pipe.send("ready")
        if pipe.recv() != "go":
            return Reduced(phase.number, (), time.monotonic())
        began = time.monotonic()
        ended: list[float] = []
        over = False
        while not over:
            # Whoever sees the end (or a new phase) says so inside the data, so that both stop after the same operation.
            data.zero_()
            data[0] = 1.0 if time.monotonic() - began > phase.seconds or pipe.poll() else 0.0
            data[1] = 1.0
            dist.all_reduce(data)
            if data[1].item() != 2.0 or data[-1].item() != 0.0:
                raise RuntimeError(f"A sum is wrong: {data[1].item()} in place of 2.")
            ended.append(time.monotonic())
            over = data[0].item() > 0
        return Reduced(phase.number, tuple(ended), began)
    finally:
        dist.destroy_process_group()
        stop_recording()


def _set_port_range(first: int, last: int) -> None:
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(f"{first} {last}")
