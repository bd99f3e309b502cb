"""Where the next generation may run: nodes in quarantine are avoided when the rest has room, else the least suspect is released.

Pure. Ray's label selectors are understood as far as Ray Train hands them on: ``value``, ``!value``, ``in(a,b)``, ``!in(a,b)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NODE_LABEL = "ray.io/node-id"


@dataclass(frozen=True)
class NodeRoom:
    """A live node: how many workers it can hold."""

    node_id: str
    workers: int


@dataclass(frozen=True)
class Suspect:
    """A node in quarantine."""

    node_id: str
    reason: str
    strikes: int = 1
    """Verdicts against it in this run."""
    whole_node: bool = False
    """The fault was the node's, not a process's: running there again is the last thing to try."""


@dataclass(frozen=True)
class Placement:
    """What to avoid. ``possible``: enough room remains; if not, ``reason`` is the sentence for the user."""

    excluded: tuple[str, ...]
    released: tuple[tuple[str, str], ...]
    """(node id, why it may run again)."""
    possible: bool
    reason: str = ""


def place(rooms: Sequence[NodeRoom], suspects: Sequence[Suspect], num_workers: int) -> Placement:
    """Which suspects to avoid for ``num_workers`` workers; those whose node is not among ``rooms`` are dead and stay avoided."""
    room = {node.node_id: node.workers for node in rooms}
    kept = {suspect.node_id: suspect for suspect in suspects}
    free = sum(workers for node_id, workers in room.items() if node_id not in kept)
    released: list[tuple[str, str]] = []
    for suspect in sorted(suspects, key=lambda one: (one.whole_node, one.strikes, one.node_id)):
        if free >= num_workers:
            break
        if room.get(suspect.node_id, 0) == 0:
            continue  # dead or too small: releasing it would not help
        del kept[suspect.node_id]
        free += room[suspect.node_id]
        released.append(
            (
                suspect.node_id,
                f"the other nodes have room for {free - room[suspect.node_id]} of {num_workers} workers; "
                f"least suspect ({suspect.strikes} verdict{'s' if suspect.strikes != 1 else ''}: {suspect.reason})",
            )
        )
    if free < num_workers:
        return Placement(
            tuple(sorted(kept)),
            (),
            possible=False,
            reason=f"Training needs {num_workers} workers, but the cluster's {len(room)} live nodes have room for {free}, "
            "nodes in quarantine included. Add a node, lower ScalingConfig(num_workers) or make it elastic: (min, max).",
        )
    return Placement(tuple(sorted(kept)), tuple(released), possible=True)


def workers_that_fit(total: Mapping[str, float], per_worker: Mapping[str, float]) -> int:
    """Workers that a node with these resources holds; a worker that needs nothing fits without end (10**6)."""
    needed = {name: amount for name, amount in per_worker.items() if amount > 0}
    if not needed:
        return 10**6
    return int(min((total.get(name, 0.0) + 1e-9) // amount for name, amount in needed.items()))


def excluding(selector: Mapping[str, str] | None, excluded: Sequence[str]) -> dict[str, str] | None:
    """The user's selector for one worker, and not on ``excluded``.

    Raises:
        ValueError: the user's selector already names node ids in a way that cannot be joined with an exclusion.
    """
    merged = dict(selector or {})
    if not excluded:
        return merged or None
    wanted = merged.get(NODE_LABEL)
    if wanted is None:
        merged[NODE_LABEL] = f"!in({','.join(excluded)})"
    elif wanted.startswith("!in("):
        merged[NODE_LABEL] = f"!in({','.join(sorted({*_items(wanted), *excluded}))})"
    elif wanted.startswith("!"):
        merged[NODE_LABEL] = f"!in({','.join(sorted({wanted[1:], *excluded}))})"
    else:
        allowed = [node for node in (_items(wanted) if wanted.startswith("in(") else [wanted]) if node not in excluded]
        if not allowed:
            raise ValueError(
                f"The label selector asks for the node {wanted}, which is in quarantine: allow other nodes or release it."
            )
        merged[NODE_LABEL] = f"in({','.join(allowed)})"
    return merged


def matches(labels: Mapping[str, str], selector: Mapping[str, str] | None) -> bool:
    """Whether a node with these labels satisfies a selector."""
    for key, wanted in (selector or {}).items():
        value = labels.get(key)
        if wanted.startswith("!in("):
            fits = value not in _items(wanted)
        elif wanted.startswith("in("):
            fits = value in _items(wanted)
        elif wanted.startswith("!"):
            fits = value != wanted[1:]
        else:
            fits = value == wanted
        if not fits:
            return False
    return True


def _items(text: str) -> list[str]:
    return [item.strip() for item in text[text.index("(") + 1 : text.rindex(")")].split(",") if item.strip()]
