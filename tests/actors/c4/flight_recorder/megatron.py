"""A Megatron-like job: its layout of ranks in groups, and the program that each rank's host runs. Used by the simulator."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    dp: int
    tp: int
    pp: int
    microbatches: int = 4
    steps: int = 3
    layers: int = 2
    experts: bool = True
    sync_in_layers: bool = True

    @property
    def world(self) -> int:
        return self.dp * self.tp * self.pp

    def rank(self, stage: int, data: int, tensor: int) -> int:
        return (stage * self.dp + data) * self.tp + tensor

    def groups(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """name -> (description, ranks), numbered as torch.distributed.new_group would."""
        found: list[tuple[str, tuple[int, ...]]] = [("default_pg", tuple(range(self.world)))]
        for p in range(self.pp):
            for t in range(self.tp):
                found.append(("DATA_PARALLEL_GROUP", tuple(self.rank(p, d, t) for d in range(self.dp))))
        for p in range(self.pp):
            for d in range(self.dp):
                found.append(("TENSOR_MODEL_PARALLEL_GROUP", tuple(self.rank(p, d, t) for t in range(self.tp))))
        for d in range(self.dp):
            for t in range(self.tp):
                found.append(("PIPELINE_MODEL_PARALLEL_GROUP", tuple(self.rank(p, d, t) for p in range(self.pp))))
        for p in range(self.pp):
            ranks = tuple(self.rank(p, d, t) for d in range(self.dp) for t in range(self.tp))
            found.append(("EXPERT_MODEL_PARALLEL_GROUP", ranks))
        return {str(number): entry for number, entry in enumerate(found)}


@dataclass
class Step:
    """One line of a rank's program: an operation, or a host's wait for its device."""

    group: str = ""
    name: str = ""
    seq: int = 0
    source: int = -1
    target: int = -1
    blocking: bool = True  # the compute stream waits for it
    wait_host: bool = False
    wait_for: int = -1  # program index of an asynchronous operation for which the compute stream waits here
    numel: int = 64


def group_of(layout: Layout, description: str, rank: int) -> str:
    """Name of the group of this description to which ``rank`` belongs."""
    return next(name for name, (kind, ranks) in layout.groups().items() if kind == description and rank in ranks)


def program_of(layout: Layout, rank: int) -> list[Step]:
    """What the host of ``rank`` does: 1F1B over the microbatches, then the gradients, step after step."""
    stage = rank // (layout.dp * layout.tp)
    tp, pp = (
        group_of(layout, "TENSOR_MODEL_PARALLEL_GROUP", rank),
        group_of(layout, "PIPELINE_MODEL_PARALLEL_GROUP", rank),
    )
    dp, ep = group_of(layout, "DATA_PARALLEL_GROUP", rank), group_of(layout, "EXPERT_MODEL_PARALLEL_GROUP", rank)
    program: list[Step] = []
    counts: dict[str, int] = {}

    def call(group: str, name: str, numel: int = 64, **more) -> int:
        counts[group] = counts.get(group, 0) + 1
        program.append(Step(group, name, counts[group], numel=numel, **more))
        return len(program) - 1

    def block(tag: int) -> None:
        for layer in range(layout.layers):
            if layout.tp > 1:
                call(tp, "_all_gather_base", 128 + layer)
            if layout.experts and layout.dp * layout.tp > 1:
                call(ep, "all_to_all", 64)
                if layout.sync_in_layers:
                    program.append(Step(wait_host=True))  # the host needs the token counts
                call(ep, "all_to_all", 64)
            if layout.tp > 1:
                call(tp, "_reduce_scatter_base", 256 + layer)

    def exchange(name: str, other: int, posted: bool) -> int:
        source, target = (stage, other) if name == "send" else (other, stage)
        return call(pp, name, source=source, target=target, blocking=not posted)

    def forward(posted: int | None) -> None:
        if stage > 0:
            if posted is None:
                exchange("recv", stage - 1, posted=False)
            else:
                program.append(Step(wait_for=posted))
        block(0)
        if stage < layout.pp - 1:
            exchange("send", stage + 1, posted=True)

    def backward(posted: int | None) -> None:
        if stage < layout.pp - 1:
            if posted is None:
                exchange("recv", stage + 1, posted=False)
            else:
                program.append(Step(wait_for=posted))
        block(1)
        if stage > 0:
            exchange("send", stage - 1, posted=True)

    for _ in range(layout.steps):
        warm = min(layout.pp - 1 - stage, layout.microbatches)
        for _ in range(warm):
            forward(None)
        for _ in range(layout.microbatches - warm):
            forward(None)
            posted = None
            if stage < layout.pp - 1:  # the receive of the gradient is posted early, and waited for later
                posted = exchange("recv", stage + 1, posted=True)
            backward(posted)
        for _ in range(warm):
            backward(None)
        if layout.dp > 1:
            call(dp, "_reduce_scatter_base", 4096)
            call(dp, "_all_gather_base", 4096)
        if layout.tp > 1:
            call(tp, "all_reduce", 1)
        program.append(Step(wait_host=True))
    return program
