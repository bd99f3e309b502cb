"""Observations on the wire: equal on the other side, small, and a master that has not heard the names says so."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace

import numpy as np
import pytest

from actors.c4.diagnosis.observation import Group, Observation
from actors.c4.monitors.wire import TABLES, Packer, UnknownGroups, Unpacker
from tests.actors.c4.monitors.rows import DP, observation

FULL = observation(
    "n0",
    (0, 1),
    progress=[(0, 0, 7, 6, 1, 1, 4096, 0.5, np.nan), (0, 1, 7, 7, 0, 0, 0, np.nan, 0.1)],
    blocks=[(0, 0, 1, 0.01, 0.02, 0.003), (0, 1, 1, 0.01, 0.02, np.nan)],
    link_blocks=[(0, 3, 0, 1, 1 << 33, 0.25)],
)


def assert_equal(one: Observation, other: Observation) -> None:
    assert (one.at_s, one.generation, one.nodes, one.groups) == (
        other.at_s,
        other.generation,
        other.nodes,
        other.groups,
    )
    for name, kind in TABLES.items():
        for field in fields(kind):
            mine, theirs = getattr(getattr(one, name), field.name), getattr(getattr(other, name), field.name)
            assert mine.dtype == theirs.dtype, (name, field.name)
            np.testing.assert_array_equal(mine, theirs)


def test_what_is_unpacked_equals_what_was_packed() -> None:
    assert_equal(Unpacker().unpack(Packer().pack(FULL)), FULL)


def test_an_empty_observation_survives_too() -> None:
    nothing = observation("n0", (), groups=())
    assert_equal(Unpacker().unpack(Packer().pack(nothing)), nothing)


def test_names_travel_once_and_again_when_they_change() -> None:
    packer, unpacker = Packer(), Unpacker()
    big = replace(FULL, groups=(Group("0", "dp", tuple(range(4000))),))
    first, second = packer.pack(big), packer.pack(big)
    assert len(second) < len(first) / 10
    unpacker.unpack(first)
    assert_equal(unpacker.unpack(second), big)
    more = replace(big, groups=(*big.groups, DP))
    assert_equal(unpacker.unpack(packer.pack(more)), more)


def test_a_master_that_was_restarted_asks_for_the_names() -> None:
    packer = Packer()
    packer.pack(FULL)
    with pytest.raises(UnknownGroups):
        Unpacker().unpack(packer.pack(FULL))
    assert_equal(Unpacker().unpack(packer.pack(FULL, full=True)), FULL)


def test_a_master_that_missed_a_change_of_names_notices() -> None:
    packer, unpacker = Packer(), Unpacker()
    unpacker.unpack(packer.pack(FULL))
    changed = replace(FULL, groups=(Group("1", "dp", (0, 1, 2, 3)),))
    packer.pack(changed)  # lost on the way
    with pytest.raises(UnknownGroups):
        unpacker.unpack(packer.pack(changed))


def test_foreign_bytes_are_refused_with_a_sentence() -> None:
    for data in (b"", b"nonsense", Packer().pack(FULL)[:-5]):
        with pytest.raises(ValueError, match="could not be read"):
            Unpacker().unpack(data)


def test_a_report_of_two_ranks_is_a_fraction_of_its_pickle() -> None:
    packer = Packer()
    packer.pack(FULL)
    assert len(packer.pack(FULL)) < len(pickle.dumps(FULL)) / 8
