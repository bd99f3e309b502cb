"""The other process of the transport tests: owns a pool of its own and does what it is told."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import torch

BLOCKS, BLOCK_BYTES = 40, 96_000


def contents(seed: int) -> torch.Tensor:
    """uint8 [BLOCKS, BLOCK_BYTES]."""
    return torch.randint(
        0, 256, (BLOCKS, BLOCK_BYTES), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def make(name: str):
    """(transport, blocks, pool) of one side."""
    from actors.llumnix.migration.transport.choice import make_transports
    from actors.llumnix.migration.transport.shared_memory import SharedPool

    kind = "file" if name == "shared_file" else "auto"
    pool = SharedPool.create(BLOCKS * BLOCK_BYTES, kind)
    blocks = pool.tensor.view(BLOCKS, BLOCK_BYTES)
    if name == "gloo":
        from actors.llumnix.migration.transport.gloo import GlooTransport

        return GlooTransport(blocks, "127.0.0.1", chunk_bytes=300_000), blocks, pool
    (transport,) = make_transports(blocks, pool, None, ["shared_memory"])
    return transport, blocks, pool


def serve(connection: Connection, name: str, seed: int) -> None:
    """Answer commands until the connection ends."""
    torch.set_num_threads(1)
    transport, blocks, pool = make(name)
    blocks.copy_(contents(seed))
    while True:
        try:
            command, *args = connection.recv()
        except EOFError:
            return
        if command == "endpoint":
            answer = transport.endpoint()
        elif command == "offer":
            answer = transport.offer(*args)
        elif command == "revoke":
            answer = transport.revoke(args[0])
        elif command == "write":
            blocks.fill_(args[0])
            answer = None
        elif command == "refill":
            blocks.copy_(contents(seed))
            answer = None
        elif command == "reachable":
            answer = transport.reachable(args[0])
        elif command == "close_pool":
            answer = pool.close()
        connection.send(answer)


class Peer:
    """A handle of the other process. ``call(command, ...)`` waits for its answer."""

    def __init__(self, name: str, seed: int = 1):
        context = multiprocessing.get_context("forkserver")  # Imports torch once for all peers.
        context.set_forkserver_preload([__name__, "actors.llumnix.migration.transport.choice"])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, seed), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, *command):
        self.connection.send(command)
        return self.connection.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)

    def close(self) -> None:
        self.connection.close()
        self.process.join(10)
