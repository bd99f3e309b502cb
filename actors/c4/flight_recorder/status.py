"""Ties ``pg_status`` to groups: its keys are numbers that each process gives its groups; only entries tie them to names."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping

from actors.c4.flight_recorder.model import GroupKey, GroupStatus, RankDump


def with_named_status(dumps: Mapping[int, RankDump]) -> Mapping[int, RankDump]:
    """The same dumps with ``status`` filled for every group whose number can be told.

    A dump of active operations has no entry of most groups. Numbers then follow in two ways. Ranks that belong to groups of the
    same descriptions number them alike, so that what entries tie on one holds on all. And numbers and names both rise in the
    order of creation: with as many of one as of the other, they pair up.
    """
    learned: dict[tuple[str, ...], dict[int, str | None]] = defaultdict(dict)
    for dump in dumps.values():
        kind = learned[_kind(dump)]
        for number, group in dump.group_numbers.items():
            description = dump.group_descriptions.get(group)
            if description:
                agreed = kind.setdefault(number, description)
                if agreed != description:
                    kind[number] = None
    return {rank: _named(dump, learned[_kind(dump)]) for rank, dump in dumps.items()}


def _kind(dump: RankDump) -> tuple[str, ...]:
    return tuple(sorted(dump.group_descriptions.values()))


def _named(dump: RankDump, learned: Mapping[int, str | None]) -> RankDump:
    if not dump.numbered_status:
        return dump
    names: dict[int, GroupKey] = {}
    by_description: dict[str, list[GroupKey]] = defaultdict(list)
    for group, description in dump.group_descriptions.items():
        by_description[description].append(group)
    for number in dump.numbered_status:
        groups = by_description.get(learned.get(number) or "", [])
        if len(groups) == 1:
            names[number] = groups[0]
    numeric = sorted((group for group in dump.group_ranks if group.isdigit()), key=int)
    if len(numeric) == len(dump.numbered_status) == len(dump.group_ranks):
        paired = dict(zip(sorted(dump.numbered_status), numeric, strict=True))
        if all(paired.get(number) == group for number, group in {**names, **dump.group_numbers}.items()):
            names = paired
    names.update(dump.group_numbers)
    status: dict[GroupKey, GroupStatus] = {
        names[number]: value for number, value in dump.numbered_status.items() if number in names
    }
    return dataclasses.replace(dump, status=status)
