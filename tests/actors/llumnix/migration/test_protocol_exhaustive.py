"""Every interleaving of one migration, breadth first: loss, duplication, reordering, time-outs, deaths, preemption, cancel."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import replace

import pytest

from actors.llumnix.migration import messages as m
from actors.llumnix.migration.protocol import Limits, SourcePhase, SourceState, step_source

from . import model


def explore(world: model.World, limit: int) -> tuple[int, Counter[str], Counter[tuple[str, ...]]]:
    """Walk all reachable worlds; returns (count, moves seen, endings seen). Fails with the path to a wrong world."""
    parents: dict[model.World, tuple[model.World, str] | None] = {world: None}
    queue = deque([world])
    labels: Counter[str] = Counter()
    endings: Counter[tuple[str, ...]] = Counter()
    while queue:
        world = queue.popleft()
        after = None
        try:
            model.check(world)
            for label, after in model.moves(world):
                labels[label] += 1
                if after not in parents:
                    parents[after] = (world, label)
                    queue.append(after)
        except AssertionError as error:
            path = []
            at: model.World | None = world
            while at is not None and parents[at] is not None:
                at, label = parents[at]
                path.append(label)
            raise AssertionError(f"{error}\nafter: " + " | ".join(reversed(path)) + f"\n{world}") from error
        if model.quiet(world):
            endings[world.finished] += 1
        assert len(parents) <= limit, "the state space grew beyond its bound"
    return len(parents), labels, endings


FAULTS = {
    "source preempts",
    "source dies",
    "destination dies",
    "client leaves",
    "no memory",
    "connection breaks at source",
}
LIVE = Limits(last_stage_max_blocks=1, max_stages=2)
ALL_OUTCOMES = {"committed", "aborted", "dropped"}


@pytest.mark.parametrize(
    ("world", "seen", "outcomes"),
    [
        (model.start(LIVE, prompt=2, max_tokens=2, faults=1, lag=False), FAULTS, ALL_OUTCOMES),
        (model.start(LIVE, prompt=3, max_tokens=3, faults=0, lag=False), {"reclaimed"}, {"committed", "aborted"}),
        (model.start(LIVE, prompt=1, max_tokens=2, faults=0), {"ingress reads dst"}, {"committed", "aborted"}),
        (model.start(Limits(mode="recompute"), prompt=2, max_tokens=2, faults=1, lag=False), FAULTS, ALL_OUTCOMES),
    ],
    ids=["faults", "growth", "lagging-ingress", "recompute"],
)
def test_no_interleaving_is_wrong(world: model.World, seen: set[str], outcomes: set[str]) -> None:
    count, labels, endings = explore(world, limit=60_000)
    # The walk is worth something only if it went everywhere.
    assert seen | {"attach", "reclaimed", "reclaim answer lost", "source times out"} <= set(labels)
    assert {ending[1] for ending in endings if ending} == outcomes
    assert count > 500


def resumes_under_the_old_epoch(s: SourceState, event: m.SourceEvent) -> tuple[SourceState, list[m.SourceAction]]:
    """The split brain of the published code: a COMMIT time-out puts the request back as if nothing had been sent."""
    if s.phase is SourcePhase.COMMITTING and isinstance(event, m.Timeout):
        return replace(s, phase=SourcePhase.ABORTED), [m.Unhold(), m.Reattach(None), m.Finish("aborted")]
    return step_source(s, event)


def forgets_the_hold(s: SourceState, event: m.SourceEvent) -> tuple[SourceState, list[m.SourceAction]]:
    state, actions = step_source(s, event)
    return state, [a for a in actions if not (isinstance(a, m.Unhold) and state.reason is m.AbortReason.TIMEOUT)]


def skips_what_grew(s: SourceState, event: m.SourceEvent) -> tuple[SourceState, list[m.SourceAction]]:
    if isinstance(event, m.Detached):
        event = replace(event, block_ids=event.block_ids[:-1])
    return step_source(s, event)


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (resumes_under_the_old_epoch, "under the old epoch"),
        (forgets_the_hold, "still holds blocks"),
        (skips_what_grew, "the client saw"),
    ],
)
def test_the_walk_finds_broken_protocols(monkeypatch: pytest.MonkeyPatch, broken: object, complaint: str) -> None:
    monkeypatch.setattr(model, "step_source", broken)
    with pytest.raises(AssertionError, match=complaint):
        explore(model.start(LIVE, prompt=2, max_tokens=3, faults=0, lag=False), limit=60_000)
