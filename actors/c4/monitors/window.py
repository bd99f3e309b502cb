"""The newest rows of one node and the finished blocks of the last while: what a master holds of a node. No Ray.

Agents send each finished block once; the window keeps them, drops the old ones, and does not mind one that comes twice (an
agent that was restarted sends its whole window again).
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.c4.diagnosis.observation import (
    BlockRows,
    Group,
    LinkBlockRows,
    LinkRows,
    Observation,
    ProgressRows,
    RankRows,
    concat,
    empty,
)


class Window:
    """Of one node."""

    def __init__(self, blocks: int):
        self._kept = blocks
        self._taken_s = 0.0
        self._newest: Observation | None = None
        self._blocks: BlockRows = _no_blocks()
        self._link_blocks: LinkBlockRows = _no_link_blocks()
        self._new_blocks: BlockRows = _no_blocks()
        self._new_link_blocks: LinkBlockRows = _no_link_blocks()

    def take(self, observation: Observation, now_s: float) -> None:
        """Add a report that arrived now."""
        if self._newest is not None and observation.groups != self._newest.groups:
            self._blocks = _regroup(self._blocks, self._newest.groups, observation.groups)
            self._link_blocks = _regroup(self._link_blocks, self._newest.groups, observation.groups)
            self._new_blocks = _regroup(self._new_blocks, self._newest.groups, observation.groups)
            self._new_link_blocks = _regroup(self._new_link_blocks, self._newest.groups, observation.groups)
        blocks, links = observation.blocks, observation.link_blocks
        if len(blocks.block):
            self._new_blocks = _below(self._new_blocks, blocks)
            self._blocks = _joined(self._blocks, blocks, (blocks.group, blocks.rank), ("group", "rank"), self._kept)
        if len(links.block):
            self._new_link_blocks = _below(self._new_link_blocks, links)
            ends = (links.group, links.source, links.destination)
            self._link_blocks = _joined(self._link_blocks, links, ends, ("group", "source", "destination"), self._kept)
        self._newest, self._taken_s = observation, now_s

    def observation(self, now_s: float, aging: bool = True, fresh: bool = False) -> Observation:
        """Everything held; ``report_age_s`` raised by the time since the report came, unless ``aging`` is off.

        ``fresh``: of the blocks only those that came since the last call with this, which are handed out once.
        """
        if self._newest is None:
            raise ValueError("The window has taken no observation.")
        ranks = self._newest.ranks
        if aging:
            age = np.float32(max(0.0, now_s - self._taken_s))
            ranks = replace(ranks, report_age_s=ranks.report_age_s + age)
        blocks, link_blocks = self._blocks, self._link_blocks
        if fresh:
            blocks, link_blocks = self._new_blocks, self._new_link_blocks
            self._new_blocks, self._new_link_blocks = _no_blocks(), _no_link_blocks()
        return replace(self._newest, ranks=ranks, blocks=blocks, link_blocks=link_blocks)

    @staticmethod
    def of_ranks_only(ranks: RankRows, generation: int, node: str) -> Observation:
        """An observation that knows of these processes and of no operation."""
        tables: dict[str, Any] = {"progress": empty(ProgressRows), "links": empty(LinkRows)}
        return Observation(
            0.0, generation, (node,), (), ranks, blocks=_no_blocks(), link_blocks=_no_link_blocks(), **tables
        )


def _joined(old, new, key_columns, names, kept):  # type: ignore[no-untyped-def]
    """``old`` and ``new`` rows together: each (key, block) once, the last ``kept`` blocks of each group."""
    again = np.isin(_keys(old, names), _keys(new, names))
    if again.any():
        old = _where(old, ~again)
    rows: Any = concat([old, new])
    newest = np.zeros(int(rows.group.max()) + 1, dtype=np.int64)
    np.maximum.at(newest, rows.group, rows.block)
    fresh = rows.block > newest[rows.group] - kept
    return rows if fresh.all() else _where(rows, fresh)


def _below(old: Any, new: Any) -> Any:
    return concat([old, new]) if len(old.block) else new


def _keys(rows, names) -> NDArray[np.int64]:  # type: ignore[no-untyped-def]
    """One number a row: of the key columns (under 2**20 each; three at most) and the block."""
    key = rows.block.astype(np.int64)
    for name in names:
        key = key * 1_000_003 + getattr(rows, name)
    return key


def _where(rows, mask):  # type: ignore[no-untyped-def]
    return type(rows)(*(getattr(rows, field.name)[mask] for field in fields(type(rows))))


def _regroup(rows, old: tuple[Group, ...], new: tuple[Group, ...]):  # type: ignore[no-untyped-def]
    """Rows under the new table of groups; rows of a group that is gone are dropped."""
    place = {group.name: index for index, group in enumerate(new)}
    mapping = np.array([place.get(group.name, -1) for group in old], dtype=np.int32)
    if not len(rows.group):
        return rows
    moved = mapping[rows.group]
    return _where(replace(rows, group=moved), moved >= 0)


def _no_blocks() -> BlockRows:
    rows = empty(BlockRows)
    if not isinstance(rows, BlockRows):
        raise TypeError("empty() answered another table.")
    return rows


def _no_link_blocks() -> LinkBlockRows:
    rows = empty(LinkBlockRows)
    if not isinstance(rows, LinkBlockRows):
        raise TypeError("empty() answered another table.")
    return rows
