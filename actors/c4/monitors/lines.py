"""A held TCP connection from every agent to the master: by its end the master knows at once that an agent's process ended.

Ray tells an actor's death after one or two seconds: until then a dead agent looks like a lost node. A kernel closes the
connections of a process that ends at once; a lost host or a cut link closes nothing. Nothing is said on the line but who calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

logger = logging.getLogger("sextant.c4.lines")

HELLO_WAIT_S = 5.0
AGAIN_S = 1.0


@dataclass(frozen=True)
class LineAddress:
    """Where the master listens; the token keeps others out."""

    host: str
    port: int
    token: str


class Lines:
    """The master's end."""

    def __init__(self, on_end: Callable[[str], Awaitable[None]]):
        """``on_end``: called with the node id when its agent's line ends."""
        self.address: LineAddress | None = None
        self._on_end = on_end
        self._server: asyncio.Server | None = None
        self._token = secrets.token_hex(16)
        self._held: dict[str, asyncio.StreamWriter] = {}

    async def open(self, host: str | None = None) -> LineAddress:
        """Listen on this host's address in the cluster, or on ``host``."""
        if host is None:
            import ray

            host = ray.util.get_node_ip_address()
        self._server = await asyncio.start_server(self._serve, host, 0)
        self.address = LineAddress(host, self._server.sockets[0].getsockname()[1], self._token)
        return self.address

    def close(self) -> None:
        """Listen no more and end all lines."""
        if self._server is not None:
            self._server.close()
        for writer in self._held.values():
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        node_id = ""
        try:
            hello = (await asyncio.wait_for(reader.readline(), HELLO_WAIT_S)).decode(errors="replace").split()
            if len(hello) != 2 or not secrets.compare_digest(hello[0], self._token):
                return
            node_id = hello[1]
            self._held[node_id] = writer
            await reader.read()  # until it ends
        except (OSError, TimeoutError, ValueError):
            pass
        finally:
            writer.close()
        if node_id and self._held.get(node_id) is writer:  # not when a new line has taken its place
            del self._held[node_id]
            await self._on_end(node_id)


async def hold_line(address: LineAddress, node_id: str, ended: asyncio.Event) -> None:
    """The agent's end: call, and hold until the line breaks or ``ended`` is set; then call again."""
    while not ended.is_set():
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(address.host, address.port)
            try:
                writer.write(f"{address.token} {node_id}\n".encode())
                await writer.drain()
                over = asyncio.get_running_loop().create_task(ended.wait())
                gone = asyncio.get_running_loop().create_task(reader.read())
                await asyncio.wait((over, gone), return_when=asyncio.FIRST_COMPLETED)
                over.cancel()
                gone.cancel()
            finally:
                writer.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), AGAIN_S)
