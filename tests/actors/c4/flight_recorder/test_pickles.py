"""Only plain data is unpickled; every pickle that could run or exhaust something is refused before it is run."""

from __future__ import annotations

import collections
import datetime
import os
import pickle
import random
from pathlib import Path

import pytest

from actors.c4.flight_recorder.errors import FlightRecorderError, RefusedPickleError, UnreadableDumpError
from actors.c4.flight_recorder.pickles import load_plain_pickle

PLAIN = {
    "text": "ä" * 300,
    "numbers": [0, -1, 255, 256, 65536, 2**31, -(2**31), 2**62, -(2**63), 2**64, 1.5],
    "nested": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, {"a": [None, True, False]}],
    "bytes": b"x" * 300,
    "entries": [{"record_id": number, "process_group": ("0", "default_pg")} for number in range(600)],
}


class Touches:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back_as_it_was(protocol: int) -> None:
    plain = dict(PLAIN)
    if protocol < 3:
        del plain["bytes"]  # pickled as a call of codecs.encode there
    assert load_plain_pickle(pickle.dumps(plain, protocol)) == plain


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_payload_is_refused_and_not_executed(protocol: int, tmp_path: Path) -> None:
    target = tmp_path / "touched"
    hostile = pickle.dumps({"version": "2.9", "entries": [Touches(target)]}, protocol)
    with pytest.raises(RefusedPickleError):
        load_plain_pickle(hostile)
    assert not target.exists()
    pickle.loads(hostile)
    assert target.exists()  # the payload works: the refusal is what kept it from running


def test_even_harmless_objects_are_refused() -> None:
    for value in (datetime.timedelta(1), collections.OrderedDict(a=1), {1, 2}, print, complex(1, 2)):
        with pytest.raises(RefusedPickleError):
            load_plain_pickle(pickle.dumps(value))


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # a memo of 16 GiB
        b"\x80\x02Np999999999\n.",
        b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\x01" * 100 + b".",  # an integer of 2 GiB
        b"\x80\x02Pevil\n.",
        b"\x80\x02\x82\x01.",  # an object from the extension registry
    ],
)
def test_what_is_out_of_proportion_is_refused(bomb: bytes) -> None:
    with pytest.raises(RefusedPickleError):
        load_plain_pickle(bomb)


def test_a_string_longer_than_the_file_is_truncation() -> None:
    for claim in (b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little"), b"\x80\x02X\xff\xff\xff\x7fabc."):
        with pytest.raises(UnreadableDumpError, match="truncated"):
            load_plain_pickle(claim)


def test_every_truncation_is_an_error_and_never_another_value() -> None:
    whole = pickle.dumps(PLAIN, 2 if False else 4)
    for length in range(0, len(whole), 37):
        with pytest.raises(FlightRecorderError):
            load_plain_pickle(whole[:length])


def is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, complex, str, bytes, bytearray)


def test_damaged_bytes_give_an_error_or_plain_data() -> None:
    chance = random.Random(0)
    whole = pickle.dumps(PLAIN["entries"][:20], 2)
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            value = load_plain_pickle(bytes(damaged))
        except FlightRecorderError:
            continue
        assert is_plain(value), value
