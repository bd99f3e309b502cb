"""Observations as compact bytes: columns one after the other, group tables only when they change, compressed. No Ray.

A pickled ``Observation`` of one rank has 10 kB, most of it names of arrays; packed it has about 100 bytes. An agent holds a
``Packer``, the master one ``Unpacker`` per agent; the packer begins (and after ``full``) with the group table.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import fields
from typing import Any

import numpy as np

from actors.c4.diagnosis.observation import (
    BlockRows,
    Group,
    LinkBlockRows,
    LinkRows,
    Observation,
    ProgressRows,
    RankRows,
    Rows,
    empty,
)

TABLES: dict[str, type[Rows]] = {
    "ranks": RankRows,
    "progress": ProgressRows,
    "links": LinkRows,
    "blocks": BlockRows,
    "link_blocks": LinkBlockRows,
}
DTYPES = {
    kind: tuple((field.name, getattr(empty(kind), field.name).dtype) for field in fields(kind))
    for kind in TABLES.values()
}
_HEAD = struct.Struct("<dqIIIIIIH")


class UnknownGroups(ValueError):
    """The bytes refer to a group table that this unpacker has not seen: ask the agent for a full report."""


class Packer:
    """Of one agent."""

    def __init__(self) -> None:
        self._groups: tuple[Group, ...] | None = None
        self._nodes: tuple[str, ...] = ()
        self._edition = 0

    def pack(self, observation: Observation, full: bool = False) -> bytes:
        """Bytes from which ``Unpacker.unpack`` makes an equal observation; with the tables of names when they changed."""
        names = b""
        if full or observation.groups != self._groups or observation.nodes != self._nodes:
            self._groups, self._nodes = observation.groups, observation.nodes
            self._edition = (self._edition + 1) % 2**16
            names = _pack_names(observation)
        tables = [getattr(observation, name) for name in TABLES]
        counts = [len(getattr(table, fields(table)[0].name)) for table in tables]
        head = _HEAD.pack(observation.at_s, observation.generation, len(names), *counts, self._edition)
        parts = [head, names]
        for (kind, table), count in zip(zip(TABLES.values(), tables, strict=True), counts, strict=True):
            if count:
                parts += [np.asarray(getattr(table, name), dtype=dtype).tobytes() for name, dtype in DTYPES[kind]]
        return zlib.compress(b"".join(parts), 1)


class Unpacker:
    """Of the master, one for each agent."""

    def __init__(self) -> None:
        self._groups: tuple[Group, ...] = ()
        self._nodes: tuple[str, ...] = ()
        self._edition = -1

    def unpack(self, packed: bytes) -> Observation:
        """The observation.

        Raises:
            UnknownGroups: the names came in bytes that this unpacker never saw.
            ValueError: these are no bytes of a packer.
        """
        try:
            data = zlib.decompress(packed)
            at_s, generation, names, *counts, edition = _HEAD.unpack_from(data)
        except (zlib.error, struct.error) as error:
            raise ValueError(f"An agent's report could not be read: {error}.") from error
        if names:
            self._nodes, self._groups = _unpack_names(data[_HEAD.size : _HEAD.size + names])
            self._edition = edition
        elif edition != self._edition:
            raise UnknownGroups("A report refers to groups that have not been told.")
        offset = _HEAD.size + names
        tables: dict[str, Any] = {}
        for (name, kind), count in zip(TABLES.items(), counts, strict=True):
            if not count:
                tables[name] = empty(kind)
                continue
            columns = []
            for _, dtype in DTYPES[kind]:
                columns.append(np.frombuffer(data, dtype=dtype, count=count, offset=offset))
                offset += count * dtype.itemsize
            tables[name] = kind(*columns)
        return Observation(at_s, generation, self._nodes, self._groups, **tables)


def _pack_names(observation: Observation) -> bytes:
    parts = [struct.pack("<HI", len(observation.nodes), len(observation.groups))]
    parts += [_text(name) for name in observation.nodes]
    for group in observation.groups:
        parts += [_text(group.name), _text(group.role), struct.pack("<I", len(group.ranks))]
        parts.append(np.asarray(group.ranks, dtype="<i4").tobytes())
    return b"".join(parts)


def _unpack_names(data: bytes) -> tuple[tuple[str, ...], tuple[Group, ...]]:
    node_count, group_count = struct.unpack_from("<HI", data)
    offset = struct.calcsize("<HI")
    nodes, groups = [], []
    for _ in range(node_count):
        name, offset = _read_text(data, offset)
        nodes.append(name)
    for _ in range(group_count):
        name, offset = _read_text(data, offset)
        role, offset = _read_text(data, offset)
        (count,) = struct.unpack_from("<I", data, offset)
        ranks = np.frombuffer(data, dtype="<i4", count=count, offset=offset + 4)
        offset += 4 + 4 * count
        groups.append(Group(name, role, tuple(ranks.tolist())))
    return tuple(nodes), tuple(groups)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<H", len(encoded)) + encoded


def _read_text(data: bytes, offset: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<H", data, offset)
    return data[offset + 2 : offset + 2 + length].decode(), offset + 2 + length
