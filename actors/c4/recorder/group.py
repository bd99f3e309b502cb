"""The recording process group: a ``dist.ProcessGroup`` in front of gloo (and NCCL), the ring inside it. No Ray.

DDP, FSDP, DeepSpeed and plain calls all meet it. Contiguous CPU all-reduce (sum, average), reduce-scatter, all-gather and
broadcast run over the recorded ring; everything else runs on gloo with its stamps taken around it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions, ProcessGroupGloo

from actors.c4.recorder.recorder import Recorder
from actors.c4.recorder.records import OpFlag, OpType
from actors.c4.recorder.ring_group import RingGroup
from actors.c4.recorder.tensors import element_type, flat_tensors, total_bytes
from actors.c4.recorder.transport import RingOptions
from actors.c4.recorder.works import JoinedWork, RecordedWork

logger = logging.getLogger("sextant.c4.recorder")

ROLES = {
    "dp": r"dp\w*|data(_?parallel)?|replicate|\w*fsdp|shard|ddp",
    "tp": r"tp|tensor(_?(model_?)?parallel)?|model_?parallel|mp",
    "pp": r"pp|pipe(line)?(_?(model_?)?parallel)?",
    "ep": r"ep|expert(_?(model_?)?parallel)?|moe",
}


def role_of(description: str) -> str:
    """dp, tp, pp, ep or "" from what a group is described as ("mesh_tp", "DATA_PARALLEL_GROUP", "dp")."""
    text = description.strip().lower().removeprefix("mesh_")
    text = re.sub(r"[\s_-]*(process)?[\s_-]*group$", "", text).replace("-", "_").replace(" ", "_")
    return next((role for role, pattern in ROLES.items() if re.fullmatch(pattern, text)), "")


_ProcessGroup: Any = (
    dist.ProcessGroup
)  # its typed overloads (a tensor for a list, a root for options) are ours at run time


class C4Group(_ProcessGroup):
    """One communicator at one rank."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        timeout: timedelta,
        *,
        name: str,
        ranks: tuple[int, ...],
        recorder: Recorder,
        options: RingOptions,
        devices: Sequence[str] = ("cpu",),
    ):
        """As torch calls it through ``register_backend``.

        Args:
            store: of this group alone.
            rank, size: in the group.
            timeout: of every operation.
            name: torch's name of the group, equal on all its ranks.
            ranks: global ranks in the group's order.
            recorder: of this process.
            options: of the ring.
            devices: "cpu", "cuda" or both.
        """
        super().__init__(rank, size)
        self.recorder = recorder
        self.ranks = ranks
        self._unique = recorder.unique_name(name)
        self._timeout = timeout
        self._role: str | None = None
        self._index = -1
        self._sequence = 0
        self._p2p: dict[str, list[int]] = {}
        kind = dist.ProcessGroup.BackendType.CUSTOM
        self.gloo = ProcessGroupGloo(store, rank, size, timeout)
        self._register_backend(torch.device("cpu"), kind, self.gloo)
        self.cuda_inner: Any = None
        if "cuda" in devices:
            from actors.c4.recorder.cuda import event_watcher, nccl_group

            self.cuda_inner = nccl_group(store, rank, size, timeout)
            self._cuda_watcher = event_watcher(recorder)
            self._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, self.cuda_inner)
        self._set_default_backend(kind)
        self.ring: RingGroup | None = None
        if size > 1:
            self.ring = RingGroup(dist.PrefixStore("c4", store), rank, ranks, options, recorder, self._unique, timeout)

    def getBackendName(self) -> str:
        return "c4"

    # ---- records

    @property
    def communicator(self) -> int:
        """Index in the ring's table. Found at the first operation: torch tells the description after construction."""
        if self._role is None:
            try:
                description = self.group_desc
            except RuntimeError:
                description = ""
            self._role = role_of(description)
            self._index = self.recorder.communicator(self._unique, self._role, self.ranks)
        return self._index

    def next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def _open_p2p(self, op: OpType, tensors: list[torch.Tensor], source: int, destination: int) -> int:
        me = self.ranks[self.rank()]
        ends: tuple[int, ...] = (self.ranks[source], self.ranks[destination]) if source >= 0 else (me,)
        name = f"{self._unique}/{ends[0] if source >= 0 else 'any'}->{ends[-1]}"
        entry = self._p2p.get(name)
        if entry is None:
            _ = self.communicator  # the role
            entry = self._p2p[name] = [self.recorder.communicator(name, self._role or "", ends), 0]
        entry[1] += 1
        peer = -1 if source < 0 else ends[-1 if op is OpType.SEND else 0]
        return self.recorder.ring.enter(
            entry[0],
            entry[1],
            op,
            element_type(tensors),
            total_bytes(tensors),
            peer,
            OpFlag.ASYNC,
            self.cuda_inner is None,
        )

    def _inner(self, tensors: list[torch.Tensor]) -> Any:
        if self.cuda_inner is not None and (not tensors or tensors[0].is_cuda):
            return self.cuda_inner
        return self.gloo

    def _run(self, op_id: int, tensors: list[torch.Tensor], call: Callable[[Any], Any]) -> Any:
        """On gloo or NCCL, with the record closed however it ends."""
        inner = self._inner(tensors)
        ring = self.recorder.ring
        try:
            if inner is self.cuda_inner:
                return self._cuda_watcher.run(op_id, lambda: call(inner))
            ring.start(op_id)
            work = RecordedWork(call(inner), self.recorder.ring, op_id)
        except BaseException:
            ring.end(op_id, OpFlag.FAILED)
            raise
        self.recorder.watch(work, RecordedWork.poll)
        return work

    # ---- collectives of the ring

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        tensors, opts = _listed(tensors), _options(dist.AllreduceOptions, opts, "reduceOp")
        if self.ring is not None and self.ring.can_reduce(tensors, opts.reduceOp):
            return self.ring.all_reduce(self, tensors[0], opts.reduceOp, _is_async(opts))
        return self._collective(OpType.ALL_REDUCE, tensors, opts, lambda inner: inner.allreduce(tensors, opts))

    def broadcast(self, tensors: Any, opts: Any = None) -> Any:
        tensors, opts = _listed(tensors), _options(dist.BroadcastOptions, opts, "rootRank")
        if self.ring is not None and len(tensors) == 1 and self.ring.can_move(tensors):
            return self.ring.broadcast(self, tensors[0], opts.rootRank, _is_async(opts))
        call = lambda inner: inner.broadcast(tensors, opts)  # noqa: E731
        return self._collective(OpType.BROADCAST, tensors, opts, call, opts.rootRank)

    def all_gather_single(self, output: Any, tensor: Any, opts: Any = None) -> Any:
        opts = opts or AllgatherOptions()
        if (
            self.ring is not None
            and self.ring.can_move([output, tensor])
            and output.numel() == tensor.numel() * self.size()
        ):
            return self.ring.all_gather(self, output, None, tensor, _is_async(opts))
        call = lambda inner: _first(inner, "all_gather_single", "_allgather_base")(output, tensor, opts)  # noqa: E731
        return self._collective(OpType.ALL_GATHER, [tensor], opts, call)

    _allgather_base = all_gather_single

    def allgather(self, outputs: Any, tensors: Any, opts: Any = None) -> Any:
        outputs, tensors, opts = _listed_twice(outputs), _listed(tensors), opts or AllgatherOptions()
        if (
            self.ring is not None
            and len(tensors) == len(outputs) == 1
            and self.ring.can_move([*outputs[0], tensors[0]])
            and len(outputs[0]) == self.size()
            and all(one.numel() == tensors[0].numel() for one in outputs[0])
        ):
            return self.ring.all_gather(self, None, outputs[0], tensors[0], _is_async(opts))
        return self._collective(OpType.ALL_GATHER, tensors, opts, lambda inner: inner.allgather(outputs, tensors, opts))

    def reduce_scatter_single(self, output: Any, tensor: Any, opts: Any = None) -> Any:
        opts = _options(dist.ReduceScatterOptions, opts, "reduceOp")
        if (
            self.ring is not None
            and self.ring.can_reduce([tensor], opts.reduceOp)
            and self.ring.can_move([output, tensor])
            and tensor.numel() == output.numel() * self.size()
        ):
            return self.ring.reduce_scatter(self, output, tensor, opts.reduceOp, _is_async(opts))
        call = lambda inner: _first(inner, "reduce_scatter_single", "_reduce_scatter_base")(output, tensor, opts)  # noqa: E731
        return self._collective(OpType.REDUCE_SCATTER, [tensor], opts, call)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        outputs, inputs = _listed(outputs), _listed_twice(inputs)
        opts = _options(dist.ReduceScatterOptions, opts, "reduceOp")
        parts = inputs[0] if len(inputs) == 1 else []
        if (
            self.ring is not None
            and len(outputs) == 1
            and len(parts) == self.size()
            and self.ring.can_reduce([outputs[0]], opts.reduceOp)
            and self.ring.can_move([outputs[0], *parts])
            and all(one.numel() == outputs[0].numel() for one in parts)
        ):
            whole = torch.cat([one.reshape(-1) for one in parts])
            return self.ring.reduce_scatter(self, outputs[0], whole, opts.reduceOp, _is_async(opts))
        flat = flat_tensors(inputs)
        return self._collective(
            OpType.REDUCE_SCATTER, flat, opts, lambda inner: inner.reduce_scatter(outputs, inputs, opts)
        )

    # ---- everything else

    def _collective(
        self, op: OpType, tensors: list[torch.Tensor], opts: Any, call: Callable[[Any], Any], root: int = -1
    ) -> Any:
        op_id = self.recorder.ring.enter(
            self.communicator, self.next_sequence(), op, element_type(tensors), total_bytes(tensors),
            self.ranks[root] if 0 <= root < len(self.ranks) else -1, OpFlag.ASYNC if _is_async(opts) else 0,
            self.cuda_inner is None,
        )  # fmt: skip
        return self._run(op_id, tensors, call)

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        opts = _options(dist.AllreduceCoalescedOptions, opts, "reduceOp")
        call = lambda inner: inner.allreduce_coalesced(tensors, opts)  # noqa: E731
        return self._collective(OpType.ALL_REDUCE, flat_tensors(tensors), opts, call)

    def allgather_coalesced(self, outputs: Any, tensors: Any, opts: Any = None) -> Any:
        opts = opts or AllgatherOptions()
        call = lambda inner: inner.allgather_coalesced(outputs, tensors, opts)  # noqa: E731
        return self._collective(OpType.ALL_GATHER, flat_tensors(tensors), opts, call)

    def all_gather_single_coalesced(self, outputs: Any, tensors: Any, opts: Any = None) -> Any:
        opts = opts or AllgatherOptions()
        if len(outputs) == len(tensors) == 1:  # what functional collectives call for a single tensor
            return self.all_gather_single(outputs[0], tensors[0], opts)
        return JoinedWork([self.all_gather_single(out, one, opts) for out, one in zip(outputs, tensors, strict=True)])

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = _options(dist.ReduceScatterOptions, opts, "reduceOp")
        if len(outputs) == len(inputs) == 1:
            return self.reduce_scatter_single(outputs[0], inputs[0], opts)
        return JoinedWork(
            [self.reduce_scatter_single(out, one, opts) for out, one in zip(outputs, inputs, strict=True)]
        )

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def reduce(self, tensors: Any, opts: Any = None) -> Any:
        tensors, opts = _listed(tensors), _options(dist.ReduceOptions, opts, "rootRank")
        call = lambda inner: inner.reduce(tensors, opts)  # noqa: E731
        return self._collective(OpType.REDUCE, tensors, opts, call, opts.rootRank)

    def gather(self, outputs: Any, tensors: Any, opts: Any = None) -> Any:
        opts = _options(dist.GatherOptions, opts, "rootRank")
        outputs, tensors = _listed_twice(outputs), _listed(tensors)
        call = lambda inner: inner.gather(outputs, tensors, opts)  # noqa: E731
        return self._collective(OpType.GATHER, tensors, opts, call, opts.rootRank)

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = _options(dist.ScatterOptions, opts, "rootRank")
        outputs, inputs = _listed(outputs), _listed_twice(inputs)
        call = lambda inner: inner.scatter(outputs, inputs, opts)  # noqa: E731
        return self._collective(OpType.SCATTER, outputs, opts, call, opts.rootRank)

    def all_to_all_single(
        self, output: Any, tensor: Any, output_splits: Any = (), input_splits: Any = (), opts: Any = None
    ) -> Any:
        opts = opts or dist.AllToAllOptions()
        out_splits, in_splits = list(output_splits), list(input_splits)
        call = lambda inner: _first(inner, "all_to_all_single", "alltoall_base")(  # noqa: E731
            output, tensor, out_splits, in_splits, opts
        )
        return self._collective(OpType.ALL_TO_ALL, [tensor], opts, call)

    alltoall_base = all_to_all_single

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = opts or dist.AllToAllOptions()
        call = lambda inner: inner.alltoall(outputs, inputs, opts)  # noqa: E731
        return self._collective(OpType.ALL_TO_ALL, flat_tensors(inputs), opts, call)

    def barrier(self, opts: Any = None) -> Any:
        opts = opts or dist.BarrierOptions()
        return self._collective(OpType.BARRIER, [], opts, lambda inner: inner.barrier(opts))

    def send(self, tensors: Any, dst: int, tag: int = 0) -> Any:
        flat = flat_tensors(tensors)
        op_id = self._open_p2p(OpType.SEND, flat, self.rank(), dst)
        return self._run(op_id, flat, lambda inner: inner.send(tensors, dst, tag))

    def recv(self, tensors: Any, src: int, tag: int = 0) -> Any:
        flat = flat_tensors(tensors)
        op_id = self._open_p2p(OpType.RECV, flat, src, self.rank())
        return self._run(op_id, flat, lambda inner: inner.recv(tensors, src, tag))

    def recv_anysource(self, tensors: Any, tag: int = 0) -> Any:
        flat = flat_tensors(tensors)
        op_id = self._open_p2p(OpType.RECV, flat, -1, self.rank())
        return self._run(op_id, flat, lambda inner: inner.recv_anysource(tensors, tag))

    # ---- the end

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout
        self.gloo._set_default_timeout(timeout)
        if self.ring is not None:
            self.ring.timeout = timeout

    def shutdown(self) -> None:
        self._close("The group was destroyed.")

    def abort(self) -> None:
        self._close("The group was aborted.")
        if self.cuda_inner is not None:
            self.cuda_inner.abort()

    def _close(self, reason: str) -> None:
        if self.ring is not None:
            self.ring.close(reason)


def _listed(tensors: Any) -> Any:
    """A list of tensors, also from the overloads that take one."""
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _listed_twice(tensors: Any) -> Any:
    """A list of lists of tensors, also from the overloads that take a list."""
    return [tensors] if tensors and isinstance(tensors[0], torch.Tensor) else tensors


def _options(kind: Any, given: Any, field: str) -> Any:
    """The options, also from the overloads that take only a reduction or a root."""
    if isinstance(given, kind):
        return given
    made = kind()
    if given is not None:
        setattr(made, field, given)
    return made


def _is_async(opts: Any) -> bool:
    """C++ callers (DDP) leave it at True."""
    return bool(getattr(opts, "asyncOp", True))


def _first(inner: Any, *names: str) -> Any:
    """The method under the first name that this torch has."""
    for name in names:
        if hasattr(inner, name):
            return getattr(inner, name)
    raise AttributeError(f"{type(inner).__name__} has none of {', '.join(names)}.")
