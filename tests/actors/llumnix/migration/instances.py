"""Instances for tests of the migrator: real engine loops, outboxes and sockets over the fake model, in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import torch

from actors.llumnix.engine.loop import EngineLoop
from actors.llumnix.engine.request import Request, TokenChunk
from actors.llumnix.migration.config import MigrationConfig
from actors.llumnix.migration.messages import KVLayout
from actors.llumnix.migration.migrator import Migrator
from actors.llumnix.migration.transport.shared_memory import SharedMemoryTransport, SharedPool
from actors.llumnix.outbox import Outbox
from tests.actors.llumnix.engine.fakes import BLOCK, Client, assert_clean, make_engine

BLOCK_BYTES = 2 * BLOCK * 4
AUTHKEY = b"a key of this test"


class Authority:
    """Epochs and what they fence, as the scheduler does it."""

    def __init__(self) -> None:
        self.instances: list[Instance] = []
        self.calls: list[tuple[str, int]] = []
        self.gone: set[str] = set()
        self.failures = 0
        self._last = 100
        self._lock = threading.Lock()

    def epoch(self) -> int:
        with self._lock:
            self._last += 1
            return self._last

    def reclaim_for(self, name: str):
        def reclaim(request_id: str, failed_epoch: int) -> int | None:
            self.calls.append((request_id, failed_epoch))
            if self.failures:
                self.failures -= 1
                raise ConnectionError("the scheduler restarts")
            for other in self.instances:
                if other.name != name and not other.dead:
                    other.abort(request_id, failed_epoch)
            return None if request_id in self.gone else self.epoch()

        return reclaim


class Instance:
    """An engine with its loop, outbox and migrator."""

    def __init__(
        self,
        authority: Authority,
        name: str,
        config: MigrationConfig | None = None,
        blocks: int = 64,
        transports=None,
        step_s: float = 0.0,
        numerics: str = "fake",
        host: str | None = None,
        **settings,
    ):
        self.name, self.dead = name, False
        self.pool = SharedPool.create(blocks * BLOCK_BYTES)
        self.engine = make_engine(blocks, name=name, **settings)
        self.engine.kv = self.pool.tensor.view(torch.float32).view(blocks, 1, 2, 1, BLOCK)
        self.step_s = step_s
        forward = self.engine.model.forward

        def slow_forward(batch, kv):
            time.sleep(self.step_s)
            return forward(batch, kv)

        self.engine.model.forward = slow_forward
        self.outbox = Outbox()
        self.loop = EngineLoop(self.engine, self.outbox.put).start()
        self.transport = SharedMemoryTransport(self.pool, BLOCK_BYTES)
        self.migrator = Migrator(
            self.loop,
            self.outbox,
            transports(self) if transports else [self.transport],
            KVLayout(numerics, BLOCK, BLOCK_BYTES),
            authority.reclaim_for(name),
            AUTHKEY,
            instance_id=name,
            host=host,
            config=config or MigrationConfig(measure="off"),
        )
        authority.instances.append(self)

    @property
    def address(self):
        return self.migrator.address

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.loop.submit(lambda r=request: self.engine.add_request(r)).result(10)

    def abort(self, request_id: str, up_to_epoch: int | None = None) -> None:
        self.loop.submit(lambda: self.engine.abort(request_id, up_to_epoch)).result(10)

    def tokens(self, request_id: str) -> int:
        status = self.loop.submit(lambda: self.engine.status(request_id)).result(10)
        return -1 if status is None else status.num_tokens

    def close(self) -> None:
        self.migrator.close()
        self.loop.stop()
        self.pool.close()


class Ingress:
    """Polls every outbox and keeps a journal by the ingress's rule: newest epoch wins, known tokens are skipped."""

    def __init__(self, instances: Iterable[Instance]):
        self.instances = list(instances)
        self.client = Client()
        self.epochs: dict[str, int] = {}
        self.acks: dict[str, int] = {}
        self.have: dict[str, int] = {}

    def poll(self) -> None:
        for instance in self.instances:
            ack, chunks = instance.outbox.collect("ingress", self.acks.get(instance.name, 0), 0.0)
            self.acks[instance.name] = ack
            for chunk in chunks:
                self._take(chunk)

    def _take(self, chunk: TokenChunk) -> None:
        name = chunk.request_id
        if chunk.epoch < self.epochs.get(name, -1) or self.client.finished(name):
            return
        self.epochs[name] = chunk.epoch
        have = self.have.get(name, 0)
        assert chunk.index <= have, f"{name}: tokens {have}..{chunk.index - 1} were lost"
        if chunk.index + len(chunk.token_ids) <= have and not (chunk.finish_reason and chunk.index == have):
            return
        self.have[name] = chunk.index + len(chunk.token_ids)
        self.client.take([chunk])

    def wait(self, *names: str, timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not all(self.client.finished(name) for name in names):
            assert time.monotonic() < deadline, f"{[n for n in names if not self.client.finished(n)]} did not finish"
            self.poll()
            time.sleep(0.002)


def wait_for(condition, what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.002)


def assert_all_clean(*instances: Instance) -> None:
    """Nothing is referenced, reserved, held, offered or leaked anywhere."""
    for instance in instances:
        wait_for(lambda i=instance: not i.migrator.active(), "migrations to end")
        instance.loop.submit(lambda i=instance: assert_clean(i.engine)).result(10)
        assert len(instance.pool._free_slots) == 512, "an offer was never revoked"
