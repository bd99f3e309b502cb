"""The faults as data: what can be asked for, and the files between the injector and the hook."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from actors.c4.diagnosis.verdict import FaultClass
from actors.c4.injection.faults import (
    KINDS,
    Applied,
    Fault,
    FaultName,
    InjectionError,
    control_file,
    read_applied,
    read_faults,
    write_applied,
    write_faults,
)


def test_every_fault_is_described_and_all_four_classes_can_be_made() -> None:
    assert set(KINDS) == set(FaultName)
    assert {kind.expected_class for kind in KINDS.values() if kind.expected} == set(FaultClass)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"factor": 0.5}, "at least 1"),
        ({"duration_s": 0}, "greater than 0"),
        ({"rate_bytes_per_s": 0}, "at least 1 byte"),
        ({"peer": 2}, "no connection to itself"),
        ({"name": FaultName.PAUSE}, "needs a duration"),
    ],
)
def test_what_makes_no_sense_is_a_sentence(changes: dict, sentence: str) -> None:
    with pytest.raises(InjectionError, match=sentence):
        Fault(**{"name": FaultName.SLOW_LINK, "rank": 2} | changes)


def test_faults_and_answers_survive_their_files(tmp_path: Path) -> None:
    path = control_file(tmp_path, os.getpid())
    assert read_faults(path) == ()
    faults = (
        Fault(FaultName.SLOW_COMPUTE, 1, factor=2.5, id="a"),
        Fault(FaultName.GIL_LOCK, 1, duration_s=3.0, id="b"),
    )
    write_faults(path, faults)
    assert read_faults(path) == faults
    answers = tmp_path / "answers"
    assert read_applied(answers) == {}
    write_applied(answers, [Applied("a", 17), Applied("b", 18, "why not")])
    assert read_applied(answers) == {"a": Applied("a", 17), "b": Applied("b", 18, "why not")}
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == [], "no half-written file is left"
