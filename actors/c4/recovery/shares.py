"""``batch_share``: how much of the global batch this rank should take, for loops that can give a slow rank less.

The shares change at a report, on all ranks at the same one. A loop that never asks, or whose cluster has no slow rank, computes
the same bits as without.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

from actors.c4.recovery.policy import Action, batch_shares

logger = logging.getLogger(__name__)

_POLL_S = 1.0


class Shares:
    """The shares that hold now in this worker process."""

    def __init__(self) -> None:
        self._shares: tuple[float, ...] | None = None
        self.asked = False

    def set(self, shares: Sequence[float] | None) -> None:
        self._shares = tuple(shares) if shares else None

    def of(self, rank: int) -> float:
        self.asked = True
        return self._shares[rank] if self._shares is not None and rank < len(self._shares) else 1.0


SHARES = Shares()


def batch_share() -> float:
    """Share of the global batch that this rank should take, in units of an even share: 1.0 unless the policy rebalances.

    The shares of all ranks sum to the world size; weight the loss by the samples actually taken. Changes only inside
    ``ray.train.report``, on all ranks together. 1.0 outside a C4Trainer.
    """
    from actors.c4.recovery.tiers import tiers

    made = tiers()
    return SHARES.of(made.plan.rank) if made is not None else 1.0


def slow_ranks(entries: Sequence[Any]) -> dict[int, float]:
    """Slowdown by rank from the master's numbered verdicts, oldest first; "rebalance" sets it, a later action unsets it."""
    slow: dict[int, dict[int, float]] = {}
    for entry in entries:
        fault = entry.repeats or entry.number
        if entry.action == Action.REBALANCE:
            slow[fault] = dict.fromkeys(entry.verdict.culprit.ranks, entry.verdict.slowdown)
        else:
            slow.pop(fault, None)
    merged: dict[int, float] = {}
    for ranks in slow.values():
        for rank, slowdown in ranks.items():
            merged[rank] = max(slowdown, merged.get(rank, 1.0))
    return merged


class ShareReader:
    """On rank 0: asks the master in the background for slow ranks, and tells it once that the loop reads its share (without
    that the policy never rebalances). ``run`` empty: never asks."""

    def __init__(self, run: str, world_size: int, generation: int = 0):
        self._world_size, self._generation = world_size, generation
        self._newest: tuple[float, ...] | None = None
        if run:
            threading.Thread(target=self._watch, args=(run,), daemon=True, name="c4-shares").start()

    def newest(self) -> tuple[float, ...] | None:
        return self._newest

    def _watch(self, run: str) -> None:
        import ray

        from actors.c4.monitors.master import find_master

        entries: list[Any] = []
        told = False
        stop = threading.Event()
        while not stop.wait(_POLL_S):
            try:
                _, master = find_master(run)
                if SHARES.asked and not told:
                    ray.get(master.loop_reads_shares.remote(self._generation), timeout=5)
                    told = True
                fresh = ray.get(master.verdicts.remote(entries[-1].number if entries else 0), timeout=5)
            except Exception as error:  # the master is away: the shares stay as they are
                logger.debug("The master does not say who is slow: %s", error)
                continue
            entries.extend(fresh)
            slow = slow_ranks(entries)
            self._newest = batch_shares(self._world_size, slow) if slow else None
