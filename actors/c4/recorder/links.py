"""A word per destination rank beside the ring, by which another process slows or stalls a worker's outgoing link. No torch.

Fault injection writes it; the transport looks before each send, which costs one memory read. A mapped write changes no
modification time and survives a worker that is stopped.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from actors.c4.recorder.errors import RecorderError, RingFormatError

_HEADER = struct.Struct("@8sqq")
_MAGIC = b"SXTC4LNK"
_VERSION = 1
WORDS_OFFSET = 64
FREE = 0
STALLED = -1


class LinkControls:
    """Words of one worker: 0 leaves the link alone, a positive number is its limit in bytes per second, -1 stalls it."""

    def __init__(self, mapped: mmap.mmap, world_size: int):
        self.map = mapped
        self.world_size = world_size
        self._words = memoryview(mapped)[WORDS_OFFSET : WORDS_OFFSET + 8 * world_size].cast("q")

    @classmethod
    def create(cls, path: Path | None, world_size: int) -> LinkControls:
        """For the worker; without a path only this process can set them. Raises RecorderError when it cannot be made."""
        size = WORDS_OFFSET + 8 * world_size
        if path is None:
            return cls(mmap.mmap(-1, size), world_size)
        try:
            with path.open("w+b") as file:
                file.truncate(size)
                file.seek(0)
                file.write(_HEADER.pack(_MAGIC, _VERSION, world_size).ljust(size, b"\0"))
                file.flush()
                return cls(mmap.mmap(file.fileno(), size), world_size)
        except OSError as error:
            raise RecorderError(f"The file of link controls {path} cannot be made: {error.strerror}.") from error

    @classmethod
    def open(cls, path: Path) -> LinkControls:
        """For the injecting process.

        Raises:
            RingFormatError: the file holds something else.
            OSError: it cannot be opened for writing.
        """
        with path.open("r+b") as file:
            head = file.read(_HEADER.size)
            if len(head) < _HEADER.size or _HEADER.unpack(head)[:2] != (_MAGIC, _VERSION):
                raise RingFormatError(f"{path} holds no link controls of version {_VERSION}.")
            world_size = _HEADER.unpack(head)[2]
            if file.seek(0, 2) < WORDS_OFFSET + 8 * world_size:
                raise RingFormatError(f"{path} is truncated.")
            return cls(mmap.mmap(file.fileno(), 0), world_size)

    def pace(self, destination: int, bytes_per_s: int) -> None:
        """Limit the link to the global rank ``destination``. Raises ValueError for no such rank or no positive rate."""
        if bytes_per_s <= 0:
            raise ValueError(f"A link's rate is a positive number of bytes per second, not {bytes_per_s}.")
        self._set(destination, bytes_per_s)

    def stall(self, destination: int) -> None:
        """Let nothing more leave on the link."""
        self._set(destination, STALLED)

    def free(self, destination: int) -> None:
        """Leave the link alone again."""
        self._set(destination, FREE)

    def get(self, destination: int) -> int:
        """The word of a link."""
        return self._words[destination]

    def close(self) -> None:
        """Unmap."""
        self._words.release()
        self.map.close()

    def _set(self, destination: int, word: int) -> None:
        if not 0 <= destination < self.world_size:
            raise ValueError(f"There is no rank {destination} in a job of {self.world_size}.")
        self._words[destination] = word
