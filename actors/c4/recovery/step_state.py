"""``StepState``: a loop's whole state kept every step in the memory of two nodes, without files.

For loops that want to lose nothing between their reported checkpoints:

    state = StepState(model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler)
    first = state.restore() + 1               # -1 when there is nothing to go on from
    for step in range(first, steps):
        ...
        state.commit(step)                    # returns when this node's memory has it; the peer's copy follows

Model, optimizer, scheduler, random generators (torch, numpy, ``random``) and whatever else has ``state_dict`` and
``load_state_dict`` (a sampler: the position in the data) come back bit by bit. A step counts when all ranks' parts of it exist;
two versions are held, so a rank that died in the middle of storing costs nothing that was whole before.
"""

from __future__ import annotations

import io
from typing import Any, Protocol

from actors.c4.recovery.memory import STATES
from actors.c4.recovery.randomness import random_states, set_random_states
from actors.c4.recovery.tiers import CheckpointTiers, tiers


class Stateful(Protocol):
    """What can be kept."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


class StepState:
    """State of one rank. Outside a C4Trainer (or with its memory tier off) ``commit`` and ``restore`` do nothing.

    Args:
        random: keep the states of the random generators, too.
        kept: what to keep, by name; each has ``state_dict`` and ``load_state_dict``.
    """

    def __init__(self, *, random: bool = True, **kept: Stateful):
        for name, value in kept.items():
            if not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
                raise TypeError(
                    f"StepState cannot keep {name}: {type(value).__name__} has no state_dict and load_state_dict."
                )
        self._random, self._kept = random, kept
        self._tiers: CheckpointTiers | None = tiers()

    def commit(self, step: int, **values: Any) -> bool:
        """Stores the state after ``step`` (grows with each call). Blocks for the copy to this node's memory.

        Args:
            step: number of the finished step, from 0.
            values: small things that ``restored`` gives back (a loss sum, an epoch).

        Returns:
            Whether this node's memory has it; a full memory is a warning, not an error.
        """
        if self._tiers is None:
            return False
        import torch

        state = {
            "step": step,
            "values": values,
            "kept": {name: one.state_dict() for name, one in self._kept.items()},
            "random": random_states() if self._random else None,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return self._tiers.store_state(step, buffer.getvalue())

    def restore(self) -> int:
        """Puts back the newest step that all ranks have; returns its number, -1 when there is none."""
        self.restored: dict[str, Any] = {}
        data = self._tiers.restored_state() if self._tiers is not None else None
        if data is None:
            return -1
        import torch

        # Written by this run into its own memory a moment ago, checked by its checksum: not a foreign file.
        state = torch.load(io.BytesIO(data), weights_only=False)
        for name, one in self._kept.items():
            one.load_state_dict(state["kept"][name])
        if self._random and state["random"] is not None and self._same_rank():
            set_random_states(state["random"])
        self.restored = state["values"]
        return int(state["step"])

    def wait_for_peer(self) -> bool:
        """Waits until the peer's memory has the newest commit; false when it has not."""
        return self._tiers is not None and self._tiers.wait_for_peer(STATES)

    def _same_rank(self) -> bool:
        """Whether the part is this rank's own; after a change of the world's size it is another's, whose numbers are not ours."""
        plan = self._tiers.plan if self._tiers is not None else None
        return plan is not None and plan.state_world_size == plan.world_size and plan.state_from_rank == plan.rank
