"""The backend ``mps``: a cap on the SMs of a process by NVIDIA's Multi-Process Service. No GPU setting is changed.

The control daemon runs as this user with pipe and log folders of its own and is ended by ``quit``. EXCLUSIVE_PROCESS, which
NVIDIA recommends, is a setting of the GPU and is never touched. Memory can be capped, L2 and bandwidth are shared.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from actors.mig.backends.errors import BackendError, BackendUnavailable, NoRoom
from actors.mig.backends.interface import BookKeeping, DeviceSlice, SliceProfile

DAEMON = "nvidia-cuda-mps-control"
SHARES = {"mps14": 14, "mps28": 28, "mps43": 43, "mps57": 57, "mps100": 100}
"""Percent of the SMs: the nearest whole numbers to 1, 2, 3, 4 and 7 of 7."""
_PATIENCE_S = 20.0

Run = Callable[..., "subprocess.CompletedProcess[str]"]


class MpsDaemon:
    """The control daemon, ours alone. ``run`` is ``subprocess.run`` (a double in tests)."""

    def __init__(self, gpu: int, run: Run = subprocess.run, which: Callable[[str], str | None] = shutil.which):
        self.gpu, self._run, self._which = gpu, run, which
        self.folder: Path | None = None

    def probe(self) -> None:
        """Raises BackendUnavailable when it cannot be started here; says why."""
        if self._which(DAEMON) is None:
            raise BackendUnavailable(
                f"There is no {DAEMON} on this machine (it comes with NVIDIA's driver): the backend green needs no daemon."
            )

    def start(self) -> None:
        """Starts it and asks it one question; a daemon that does not answer is ended again."""
        if self.folder is not None:
            return
        self.probe()
        self.folder = Path(tempfile.mkdtemp(prefix="sextant-mps-"))
        for name in ("pipe", "log"):
            (self.folder / name).mkdir()
        try:
            done = self._call([DAEMON, "-d"], None)
            if done.returncode != 0:
                raise BackendUnavailable(f"The MPS daemon did not start: {_line(done)}")
            answer = self._call([DAEMON], "get_server_list\n")
            if answer.returncode != 0:
                raise BackendUnavailable(
                    f"The MPS daemon does not answer: {_line(answer)} In a container it needs the host's IPC namespace."
                )
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """``quit`` to the daemon, whatever it says, then its folder goes."""
        folder = self.folder
        if folder is None:
            return
        with suppress(BackendError):
            self._call([DAEMON], "quit -t 10\n")
        self.folder = None
        shutil.rmtree(folder, ignore_errors=True)

    def environment(self) -> dict[str, str]:
        if self.folder is None:
            raise BackendError("The MPS daemon is not running.")
        return {
            "CUDA_MPS_PIPE_DIRECTORY": str(self.folder / "pipe"),
            "CUDA_MPS_LOG_DIRECTORY": str(self.folder / "log"),
            "CUDA_VISIBLE_DEVICES": str(self.gpu),
        }

    def _call(self, command: list[str], text: str | None) -> subprocess.CompletedProcess[str]:
        environment: Mapping[str, str] = {**os.environ, **self.environment()}
        try:
            return self._run(
                command, input=text, env=environment, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise BackendUnavailable(f"The MPS daemon did not answer within {_PATIENCE_S:.0f} s.") from error
        except OSError as error:
            raise BackendUnavailable(f"The MPS daemon could not be called: {error.strerror}.") from error


class MpsBackend(BookKeeping):
    """One GPU, shared by processes each capped to a percentage of its SMs."""

    name = "mps"
    label = "MPS: SM caps; L2 and memory bandwidth are shared"

    def __init__(self, gpu: int = 0, memory_mib: float | None = None, daemon: MpsDaemon | None = None):
        """``memory_mib``: of the GPU; when given, each slice's memory is capped in proportion."""
        super().__init__()
        self.gpu, self.memory_mib = gpu, memory_mib
        self._daemon = daemon or MpsDaemon(gpu)
        self._slices: dict[str, DeviceSlice] = {}

    @property
    def device(self) -> str:
        return f"gpu-{self.gpu}"

    def probe(self) -> None:
        """Raises BackendUnavailable, with the reason, where MPS cannot run."""
        self._daemon.start()

    def profiles(self) -> tuple[SliceProfile, ...]:
        memory = self.memory_mib
        return tuple(
            SliceProfile(name, percent / 100, None if memory is None else memory * percent / 100, 100 // percent)
            for name, percent in SHARES.items()
        )

    def fits(self, profiles: Sequence[str]) -> bool:
        return sum(SHARES[self.profile(name).name] for name in profiles) <= 100

    def slices(self) -> tuple[DeviceSlice, ...]:
        return tuple(self._slices.values())

    def create(self, profile: str) -> DeviceSlice:
        self.profile(profile)
        taken = sum(SHARES[found.profile] for found in self._slices.values())
        if taken + SHARES[profile] > 100:
            raise NoRoom(f"No room for {profile}: {taken} % of the SMs of GPU {self.gpu} are taken.")
        self._daemon.start()
        made = DeviceSlice(self._new_uuid(profile), self.name, self.device, profile, f"{SHARES[profile]} % of the SMs")
        self._slices[made.uuid] = made
        return made

    def close(self) -> None:
        """Ends the daemon."""
        self._held.clear()
        self._slices.clear()
        self._daemon.stop()

    def _remove(self, found: DeviceSlice) -> None:
        del self._slices[found.uuid]

    def _environment(self, found: DeviceSlice) -> dict[str, str]:
        percent = SHARES[found.profile]
        variables = {**self._daemon.environment(), "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(percent)}
        if self.memory_mib is not None:
            # The daemon numbers the GPUs that a client sees from 0.
            variables["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = f"0={int(self.memory_mib * percent / 100)}M"
        return variables


def _line(done: subprocess.CompletedProcess[str]) -> str:
    text = (done.stderr or done.stdout or f"exit code {done.returncode}").strip().splitlines()
    return (text[0] if text else f"exit code {done.returncode}").rstrip(".") + "."
