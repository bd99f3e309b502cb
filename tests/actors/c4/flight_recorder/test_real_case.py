"""The real labelled case: 16 ranks of a TP x DP x PP x EP job whose ranks 12 and 14 were given a GPU error."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest

from actors.c4.flight_recorder import Cause, FaultClass, diagnose_folder
from actors.c4.flight_recorder.pickles import load_plain_pickle

pytestmark = pytest.mark.shared_data


@pytest.fixture
def case(shared_data: Path) -> Path:
    return shared_data / "collectives" / "flight_recorder" / "gpu_error_1st"


def copy(case: Path, folder: Path, leave_out: int | None = None) -> Path:
    for file in case.glob("_dump_*"):
        if file.name != f"_dump_{leave_out}":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_both_faulty_ranks_are_named_and_no_other(case: Path) -> None:
    truth = json.loads(re.search(r"Fault ranks: (\[.*\])", (case / "fault_injection.log").read_text()).group(1))
    verdict = diagnose_folder(case)
    assert list(verdict.culprit_ranks) == truth == [12, 14]
    assert verdict.fault_class is FaultClass.NON_COMMUNICATION_HANG
    assert {finding.cause for finding in verdict.findings} == {Cause.DEVICE_FROZEN}
    assert verdict.process_group == "41:TENSOR_MODEL_PARALLEL_GROUP"
    assert verdict.sequence == 42806
    assert not verdict.warnings


def test_the_same_as_json(case: Path, tmp_path: Path) -> None:
    for file in case.glob("_dump_*"):
        (tmp_path / f"rank_{file.name[6:]}.json").write_text(json.dumps(load_plain_pickle(file.read_bytes())))
    assert diagnose_folder(tmp_path).culprit_ranks == (12, 14)


def test_a_lost_dump_never_makes_an_innocent_rank_guilty(case: Path, tmp_path: Path) -> None:
    for lost in range(16):
        folder = tmp_path / str(lost)
        folder.mkdir()
        verdict = diagnose_folder(copy(case, folder, leave_out=lost))
        assert {12, 14} - {lost} <= set(verdict.culprit_ranks) <= {12, 14}
        assert {12, 14} <= set(verdict.culprit_ranks) | set(verdict.suspects)


@pytest.mark.parametrize("rank", [12, 14])
def test_a_faulty_rank_whose_dump_lists_no_entries_is_named_all_the_same(case: Path, tmp_path: Path, rank: int) -> None:
    file = copy(case, tmp_path) / f"_dump_{rank}"
    dump = load_plain_pickle(file.read_bytes())
    for change in (lambda: dump.update(entries=[]), lambda: dump.pop("entries"), lambda: dump.clear()):
        change()
        file.write_bytes(pickle.dumps(dump) if dump else b"")
        assert diagnose_folder(tmp_path).culprit_ranks == (12, 14)
