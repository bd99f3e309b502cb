"""Instances and a scheduler in one process, behind the ingress's ports: for tests of the frontend and of the HTTP app.

The fake model's next token is a function of the tokens so far and the seed, so a continuation or a migration that loses,
repeats or changes a token shows up in the text. An instance really keeps unacknowledged chunks, really dies, and a fake
migration really sends the unacknowledged chunks again from the destination.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib

from actors.llumnix.engine.request import Request, TokenChunk, TokenLogprob
from actors.llumnix.ports import (
    DispatchRequest,
    InstanceDied,
    InstanceInfo,
    Membership,
    Placement,
    Refusal,
    ServiceUnavailable,
)

VOCAB = 256
MAX_LEN = 512


class ByteTokenizer:
    """One token a byte; the chat template writes the role before each message."""

    vocab_size = VOCAB

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def apply_chat_template(self, messages, add_generation_prompt: bool = True) -> list[int]:
        text = "".join(f"{m['role']}:{m['content']}\n" for m in messages)
        return self.encode(text + ("assistant:" if add_generation_prompt else ""))


def next_token(prompt: tuple[int, ...], output: list[int], seed: int) -> int:
    """A printable byte that depends on everything before it."""
    digest = hashlib.blake2b(repr((prompt, output, seed)).encode(), digest_size=2).digest()
    return 97 + int.from_bytes(digest, "big") % 26


def expected_text(request: Request) -> str:
    """The oracle: what the fake model says to ``request``, alone and undisturbed."""
    output: list[int] = []
    while len(output) < request.sampling.max_tokens:
        output.append(next_token(request.prompt_token_ids, output, request.sampling.seed))
    return bytes(output).decode()


class FakeInstance:
    def __init__(self, name: str, step_s: float = 0.001):
        self.name, self.step_s = name, step_s
        self.requests: dict[str, tuple[Request, list[int]]] = {}
        self.aborts: list[tuple[str, int | None]] = []
        self.chunks: list[tuple[int, TokenChunk]] = []
        self.seq = 0
        self.news = asyncio.Event()
        self.dead = False
        self.paused = False
        self.fail_next: str | None = None
        self.added: list[Request] = []
        self._loop_task = asyncio.get_running_loop().create_task(self._run())

    def info(self) -> InstanceInfo:
        return InstanceInfo(self.name, "node", 0, "fake", "fake", MAX_LEN, 16, 64)

    def die(self) -> None:
        self.dead = True
        self._loop_task.cancel()
        self.news.set()

    def _check(self) -> None:
        if self.dead:
            raise InstanceDied(f"{self.name} is dead")

    async def add_request(self, request: Request) -> Refusal | None:
        self._check()
        if len(request.prompt_token_ids) + request.sampling.max_tokens > MAX_LEN:
            return Refusal("too long for all KV memory", "prompt")
        self.added.append(request)
        self.requests[request.request_id] = (request, list(request.output_token_ids))
        return None

    async def abort(self, request_id: str, up_to_epoch: int | None) -> bool:
        self._check()
        self.aborts.append((request_id, up_to_epoch))
        held = self.requests.get(request_id)
        if held is not None and (up_to_epoch is None or held[0].epoch <= up_to_epoch):
            del self.requests[request_id]
            return True
        return False

    async def collect(self, ingress_id: str, ack: int):
        self._check()
        self.chunks = [(seq, chunk) for seq, chunk in self.chunks if seq > ack]
        while not self.chunks:
            self.news.clear()
            await self.news.wait()
            self._check()
        return self.chunks[-1][0], [chunk for _, chunk in self.chunks]

    def emit(self, chunk: TokenChunk) -> None:
        self.seq += 1
        self.chunks.append((self.seq, chunk))
        self.news.set()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            if not self.paused:
                for request_id in list(self.requests):
                    self._step(request_id)

    def _step(self, request_id: str) -> None:
        request, output = self.requests[request_id]
        if self.fail_next == request_id:
            del self.requests[request_id]
            self.emit(TokenChunk(request_id, request.epoch, len(output), (), "", finish_reason="error", error="broken"))
            return
        token = next_token(request.prompt_token_ids, output, request.sampling.seed)
        output.append(token)
        done = len(output) >= request.sampling.max_tokens
        logprobs = None
        if request.sampling.logprobs is not None:
            top = tuple((97 + i, -1.0 - i) for i in range(request.sampling.logprobs))
            logprobs = (TokenLogprob(token, -0.5, top),)
        self.emit(
            TokenChunk(
                request_id,
                request.epoch,
                len(output) - 1,
                (token,),
                chr(token),
                logprobs=logprobs,
                finish_reason="length" if done else None,
                prompt_tokens=len(request.prompt_token_ids),
            )
        )
        if done:
            del self.requests[request_id]

    def hand_over(self, request_id: str, destination: FakeInstance, epoch: int) -> None:
        """A migration: the unacknowledged chunks travel along and are sent again under the new epoch."""
        request, output = self.requests.pop(request_id)
        unacked = [chunk for _, chunk in self.chunks if chunk.request_id == request_id]
        destination.requests[request_id] = (dataclasses.replace(request, epoch=epoch), output)
        for chunk in unacked:
            destination.emit(dataclasses.replace(chunk, epoch=epoch))


class FakeScheduler:
    def __init__(self, *instances: FakeInstance):
        self.instances = {instance.name: instance for instance in instances}
        self.version = 1
        self.changed = asyncio.Event()
        self.epoch = 0
        self.turn = 0
        self.down = False
        self.aborted: list[str] = []
        self.ended: list[str] = []
        self.dispatched: list[DispatchRequest] = []
        self.places: dict[str, str] = {}

    def _check(self) -> None:
        if self.down:
            raise ServiceUnavailable("the scheduler is down")

    async def dispatch(self, request: DispatchRequest) -> Placement:
        self._check()
        live = [n for n, i in self.instances.items() if not i.dead and n not in request.exclude]
        if not live:
            raise ServiceUnavailable("No instance is ready.")
        self.dispatched.append(request)
        self.turn += 1
        name = self.places.get(request.near or "") or live[self.turn % len(live)]
        self.places[request.request_id] = name
        self.epoch += 1
        return Placement(name, self.epoch)

    async def abort(self, request_ids) -> None:
        self._check()
        self.epoch += 1
        for request_id in request_ids:
            self.aborted.append(request_id)
            for instance in self.instances.values():
                if not instance.dead:
                    await instance.abort(request_id, self.epoch)

    async def finished(self, request_ids) -> None:
        self._check()
        self.ended.extend(request_ids)

    async def locate(self, request_ids):
        self._check()
        return {
            r: next((n for n, i in self.instances.items() if not i.dead and r in i.requests), None) for r in request_ids
        }

    async def members(self, known_version: int) -> Membership:
        self._check()
        while known_version == self.version:
            self.changed.clear()
            await self.changed.wait()
        live = {n: i for n, i in self.instances.items() if not i.dead}
        return Membership(self.version, live, {n: i.info() for n, i in live.items()})

    def join(self, instance: FakeInstance) -> None:
        self.instances[instance.name] = instance
        self.version += 1
        self.changed.set()

    def migrate(self, request_id: str) -> bool:
        """Move a request to another live instance, as an order of the scheduler would."""
        for source in self.instances.values():
            if not source.dead and request_id in source.requests:
                others = [i for i in self.instances.values() if i is not source and not i.dead]
                if others:
                    self.epoch += 1
                    source.hand_over(request_id, others[0], self.epoch)
                    return True
        return False
