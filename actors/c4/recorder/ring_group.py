"""Ring collectives of one group at one rank: makes jobs of tensors and runs them in order, here or in its own thread. No Ray."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from actors.c4.recorder.engine import Job, PythonEngine
from actors.c4.recorder.errors import MismatchError
from actors.c4.recorder.failing import error_kind
from actors.c4.recorder.native import NativeEngine, native_engine, runs_natively
from actors.c4.recorder.plan import Plan, make_plan
from actors.c4.recorder.recorder import Recorder
from actors.c4.recorder.records import OpFlag, OpType
from actors.c4.recorder.tensors import SUMMABLE, as_bytes, element_type
from actors.c4.recorder.transport import RingOptions, RingTransport
from actors.c4.recorder.wire import FORMS, REDUCTIONS, Announcement
from actors.c4.recorder.works import RingWork

logger = logging.getLogger("sextant.c4.recorder")

_REDUCTIONS = {dist.ReduceOp.SUM: "sum", dist.ReduceOp.AVG: "avg"}
_IDLE_S = 5.0


class Numbering(Protocol):
    """What the ring asks of the process group: under which communicator and number an operation is recorded."""

    @property
    def communicator(self) -> int: ...

    def next_sequence(self) -> int: ...


class RingGroup:
    """The ring of one group. Operations run in the order of their calls, one at a time."""

    def __init__(
        self, store: dist.Store, rank: int, ranks: tuple[int, ...], options: RingOptions, recorder: Recorder, name: str,
        timeout: timedelta,
    ):  # fmt: skip
        self.transport = RingTransport(store, rank, ranks, options, recorder.links, name)
        self.recorder, self.options, self.timeout = recorder, options, timeout
        self.rank, self.size, self.ranks = rank, len(ranks), ranks
        self._engine: PythonEngine | None = None
        self._native: NativeEngine | None = None
        self._lock = threading.Lock()
        self._pending: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting = 0  # queued or running
        self._thread: threading.Thread | None = None
        self._closed = False

    # ---- what the ring can do

    def can_move(self, tensors: list[torch.Tensor]) -> bool:
        """Contiguous, dense, on the CPU, of one dtype."""
        dtype = tensors[0].dtype
        return all(
            tensor.device.type == "cpu"
            and tensor.layout is torch.strided
            and tensor.is_contiguous()
            and tensor.dtype == dtype
            for tensor in tensors
        )

    def can_reduce(self, tensors: list[torch.Tensor], reduction: Any) -> bool:
        """One such tensor, summed or averaged (an average of floating-point numbers)."""
        if len(tensors) != 1 or not self.can_move(tensors) or tensors[0].dtype not in SUMMABLE:
            return False
        name = _reduction(reduction)
        return name == "sum" or (name == "avg" and tensors[0].dtype.is_floating_point)

    # ---- operations

    def all_reduce(self, group: Numbering, tensor: torch.Tensor, reduction: Any, is_async: bool) -> RingWork:
        """In place. The order of addition is ``RingOptions.algorithm``'s."""
        return self._submit(group, OpType.ALL_REDUCE, tensor, tensor, [tensor], is_async, _reduction(reduction))

    def broadcast(self, group: Numbering, tensor: torch.Tensor, root: int, is_async: bool) -> RingWork:
        return self._submit(group, OpType.BROADCAST, tensor, tensor, [tensor], is_async, root=root)

    def all_gather(
        self, group: Numbering, output: torch.Tensor | None, outputs: list[torch.Tensor] | None, tensor: torch.Tensor,
        is_async: bool,
    ) -> RingWork:  # fmt: skip
        """Into one tensor, or into a list of them."""
        whole = output if output is not None else torch.empty(tensor.numel() * self.size, dtype=tensor.dtype)
        own = whole.view(-1)[self.rank * tensor.numel() : (self.rank + 1) * tensor.numel()]

        def before() -> None:
            if own.data_ptr() != tensor.data_ptr():
                own.copy_(tensor.reshape(-1))

        def after() -> None:
            if outputs is not None:
                for place, part in zip(outputs, whole.view(self.size, -1), strict=True):
                    place.copy_(part.view(place.shape))

        results = [whole] if outputs is None else outputs
        return self._submit(group, OpType.ALL_GATHER, tensor, whole, results, is_async, before=before, after=after)

    def reduce_scatter(
        self, group: Numbering, output: torch.Tensor, tensor: torch.Tensor, reduction: Any, is_async: bool
    ) -> RingWork:
        """The input is left as it is. Chunk c is added in the order c+1, c+2, .., c (mod n), whatever its place or size."""
        work: list[torch.Tensor] = []

        def before() -> None:
            work.append(tensor.clone())

        def after() -> None:
            output.view(-1).copy_(work[0].view(self.size, -1)[self.rank])
            work.clear()

        return self._submit(
            group, OpType.REDUCE_SCATTER, tensor, lambda: work[0], [output], is_async, _reduction(reduction),
            before=before, after=after,
        )  # fmt: skip

    def close(self, reason: str) -> None:
        """Fail what is still queued, end the thread, close the connections."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.transport.interrupt(reason)
        self._pending.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=_IDLE_S)
        self.transport.close()

    # ---- how they run

    def _submit(
        self, group: Numbering, op: OpType, payload: torch.Tensor, buffer: Any, outputs: list[torch.Tensor], is_async: bool,
        reduction: str | None = None, root: int = -1, before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> RingWork:  # fmt: skip
        announcement = Announcement(
            group.next_sequence(), payload.numel() * payload.element_size(), root, op, element_type([payload]),
            REDUCTIONS.index(reduction or "none"),
            FORMS.index(self.options.algorithm) if op is OpType.ALL_REDUCE else 0,
        )  # fmt: skip
        flags = OpFlag.RING | (OpFlag.ASYNC if is_async else 0)
        communicator = group.communicator
        op_id = self.recorder.ring.enter(
            communicator, announcement.sequence, op, announcement.element_type, announcement.payload,
            self.ranks[root] if root >= 0 else -1, flags,
        )  # fmt: skip
        work = RingWork(outputs, self.timeout)

        def run() -> None:
            error: BaseException | None = None
            flag = 0
            try:
                if before is not None:
                    before()
                self._run(announcement, op_id, communicator, buffer() if callable(buffer) else buffer, reduction, root)
                if after is not None:
                    after()
            except BaseException as raised:
                error = raised
                flag = OpFlag.FAILED | (OpFlag.MISMATCH if isinstance(raised, MismatchError) else 0)
                self.transport.abort(f"Rank {self.ranks[self.rank]} gave up in {announcement}: {raised!r}"[:500])
            self.recorder.ring.end(op_id, flag)
            with self._lock:
                self._waiting -= 1
            work.finish(error)

        with self._lock:
            inline = not is_async and self._waiting == 0
            self._waiting += 1
        if inline:
            run()
        else:
            self._start_thread()
            self._pending.put(run)
        return work

    def _run(
        self,
        announcement: Announcement,
        op_id: int,
        communicator: int,
        buffer: torch.Tensor,
        reduction: str | None,
        root: int,
    ) -> None:
        transport = self.transport
        if transport.error is not None:
            raise error_kind(transport.error)(transport.error)
        if not transport.connected:
            transport.connect(self.timeout.total_seconds())
        if self._engine is None:
            self._engine = PythonEngine(transport)
            self._native = native_engine(transport, self.recorder.ring.address) if self.options.native else None
        ring = self.recorder.ring
        outgoing, incoming = ring.open_edges(
            op_id,
            announcement.sequence,
            communicator,
            transport.predecessor,
            self.ranks[self.rank],
            transport.successor,
        )
        plan = make_plan(
            OpType(announcement.op_type), buffer.numel() * buffer.element_size(), buffer.element_size(), self.rank, self.size,
            root=max(root, 0), piece_bytes=self.options.piece_bytes, rotated=self.options.algorithm == "rotated",
        )  # fmt: skip
        job = make_job(announcement, plan, buffer, reduction == "avg", self.size)
        ring.start(op_id)
        engine = self._native if self._native is not None and runs_natively(announcement.element_type) else self._engine
        engine.run(job, outgoing, incoming, self.timeout.total_seconds())

    def _start_thread(self) -> None:
        with self._lock:
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=_serve, args=(self._pending,), name="c4-ring", daemon=True)
            self._thread.start()
        # A group that nobody destroys leaves no thread behind either.
        weakref.finalize(self, self._pending.put, None)


def make_job(announcement: Announcement, plan: Plan, buffer: torch.Tensor, average: bool, size: int) -> Job:
    """The job of a contiguous tensor. Half types are added in float32 and rounded at each hop."""
    flat = buffer.view(-1)
    width = buffer.element_size()

    def add(offset: int, length: int, scratch: bytearray) -> None:
        first, count = offset // width, length // width
        own = flat[first : first + count]
        torch.add(torch.frombuffer(scratch, dtype=flat.dtype, count=count), own, out=own)

    def divide(offset: int, length: int) -> None:
        flat[offset // width : (offset + length) // width].div_(size)

    return Job(announcement, plan, as_bytes(buffer), add, average, divide, buffer)


def _serve(pending: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (run := pending.get()) is not None:
        try:
            run()
        except BaseException:  # run() hands every error to its work; what comes here is a fault of ours
            logger.exception("An operation of the ring could not be ended in order.")
        del run


def _reduction(reduction: Any) -> str | None:
    for kind, name in _REDUCTIONS.items():
        if reduction == kind:
            return name
    return None
