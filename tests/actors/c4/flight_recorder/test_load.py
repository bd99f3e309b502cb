"""Folders as users bring them: complete, damaged, mixed, hostile, empty: each ends in a verdict with a warning or a sentence."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path

import pytest

from actors.c4.flight_recorder import FaultClass, FlightRecorderError, Limits, diagnose_folder, load_folder
from tests.actors.c4.flight_recorder.dumps import dump, entry
from tests.actors.c4.flight_recorder.megatron import Layout
from tests.actors.c4.flight_recorder.simulator import Fault, simulate

WAITING = [entry(0, seq=1), entry(1, seq=2, state="scheduled")]
WORLD = 4


def write(folder: Path, name: str = "_dump_{}", encode=pickle.dumps, culprit: int = 2, **more) -> Path:
    """Four ranks of which ``culprit`` did not enter the second collective."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(WORLD):
        content = encode(dump(WAITING[:1] if rank == culprit else WAITING, **more))
        (folder / name.format(rank)).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize("name", ["_dump_{}", "nccl_trace_rank_{}", "rank_{}.json", "job-7/host3_rank{}.pkl", "x{}"])
@pytest.mark.parametrize("encode", [pickle.dumps, json.dumps], ids=["pickle", "json"])
def test_any_name_that_ends_in_the_rank_and_either_encoding(tmp_path: Path, name: str, encode) -> None:
    folder = tmp_path / Path(name).parent
    assert diagnose_folder(write(folder, Path(name).name, encode)).culprit_ranks == (2,)
    if folder != tmp_path:
        assert diagnose_folder(tmp_path).culprit_ranks == (2,)  # a nested folder is found


def test_one_file_may_hold_all_ranks(tmp_path: Path) -> None:
    ranks = {str(rank): dump(WAITING[:1] if rank == 1 else WAITING) for rank in range(WORLD)}
    (tmp_path / "all.json").write_text(json.dumps(ranks))
    assert diagnose_folder(tmp_path).culprit_ranks == (1,)
    assert diagnose_folder(tmp_path / "all.json").culprit_ranks == (1,)


def test_a_folder_a_node_is_one_set_and_two_sets_are_not(tmp_path: Path) -> None:
    write(tmp_path / "set")
    for rank in range(WORLD):
        node = tmp_path / "nodes" / f"node{rank // 2}"
        node.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / f"_dump_{rank}").rename(node / f"_dump_{rank}")
    assert diagnose_folder(tmp_path / "nodes").culprit_ranks == (2,)
    write(tmp_path / "runs" / "a")
    write(tmp_path / "runs" / "b")
    with pytest.raises(FlightRecorderError, match="several sets of dumps .a, b.: name one"):
        diagnose_folder(tmp_path / "runs")


def test_logs_and_other_files_are_never_read_for_the_answer(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "fault_injection.log").write_text("Fault ranks: [0]\n")
    (tmp_path / "notes.json").write_text('{"culprit": 0}')
    (tmp_path / "core.77").write_bytes(b"\x7fELF")
    verdict = diagnose_folder(tmp_path)
    assert verdict.culprit_ranks == (2,)
    assert not any("fault_injection" in warning for warning in verdict.warnings)


@pytest.mark.parametrize("size", [1, 100, 500])
def test_a_truncated_dump_is_left_out_with_a_warning(tmp_path: Path, size: int) -> None:
    file = write(tmp_path) / "_dump_0"
    file.write_bytes(file.read_bytes()[:size])
    verdict = diagnose_folder(tmp_path)
    assert verdict.culprit_ranks == (2,)
    assert any(warning.startswith("Left out _dump_0") for warning in verdict.warnings)
    assert any("No usable dump of rank 0 (of 4 ranks)" in warning for warning in verdict.warnings)


def test_a_rank_without_a_dump_is_named_when_only_it_can_be_awaited(tmp_path: Path) -> None:
    (write(tmp_path, culprit=9) / "_dump_3").unlink()
    verdict = diagnose_folder(tmp_path)
    assert verdict.culprit_ranks == (3,)
    assert verdict.confidence == "medium"
    (tmp_path / "_dump_3").write_bytes(b"")
    verdict = diagnose_folder(tmp_path)
    assert verdict.culprit_ranks == (3,)
    assert "left an empty dump" in verdict.evidence[0]


def test_a_lost_file_of_a_rank_that_a_named_culprit_may_hold_up_is_only_a_suspect(tmp_path: Path) -> None:
    case = simulate(Layout(dp=2, tp=2, pp=2), [Fault.HOST_STOP], seed=5)
    (culprit,) = case.truth
    for lost in range(8):
        for rank, content in case.dumps.items():
            (tmp_path / f"_dump_{rank}").write_bytes(pickle.dumps(content))
        (tmp_path / f"_dump_{lost}").unlink()
        verdict = diagnose_folder(tmp_path)
        if lost == culprit:
            assert culprit in verdict.culprit_ranks
        else:
            assert verdict.culprit_ranks == (culprit,)
        assert verdict.silent == (lost,)


def test_a_hostile_pickle_among_good_ones_is_refused_and_not_executed(tmp_path: Path) -> None:
    target = tmp_path / "touched.log"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {target}",)

    (write(tmp_path) / "_dump_0").write_bytes(pickle.dumps({"version": "2.9", "entries": [Payload()]}))
    verdict = diagnose_folder(tmp_path)
    assert verdict.culprit_ranks == (2,)
    assert "Refused _dump_0" in verdict.warnings[0]
    assert not target.exists()
    for rank in range(1, WORLD):
        (tmp_path / f"_dump_{rank}").unlink()
    with pytest.raises(FlightRecorderError, match="refused _dump_0.*Nothing was executed"):
        diagnose_folder(tmp_path)
    assert not target.exists()


def test_dumps_of_another_world_are_left_out_and_a_tie_is_an_error(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "_dump_4").write_bytes(pickle.dumps(dump(WAITING, world=8)))
    verdict = diagnose_folder(tmp_path)
    assert verdict.culprit_ranks == (2,)
    assert verdict.world_size == 4
    assert any("of another run (8 ranks; this one has 4)" in warning for warning in verdict.warnings)
    for rank in range(5, 8):
        (tmp_path / f"_dump_{rank}").write_bytes(pickle.dumps(dump(WAITING, world=8)))
    with pytest.raises(FlightRecorderError, match="mixes dumps of different runs"):
        diagnose_folder(tmp_path)


def test_a_dump_of_a_run_of_another_day_is_left_out(tmp_path: Path) -> None:
    write(tmp_path)
    old = dump([entry(0, seq=7, state="scheduled", time_created_ns=1_600_000_000_000_000_000)])
    (tmp_path / "_dump_0").write_bytes(pickle.dumps(old))
    verdict = diagnose_folder(tmp_path)
    assert verdict.culprit_ranks == (2,)
    assert any("hours apart" in warning for warning in verdict.warnings)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it is empty"),
        (b"{", "truncated or no JSON"),
        (b'{"entries": 5}', "no list of records"),
        (b'{"a": 1}', "holds no Flight Recorder dump"),
        (b"[" * 5000, "JSON"),
        (random.Random(1).randbytes(400), "."),
        (pickle.dumps([1, 2]), "holds no Flight Recorder dump"),
        (pickle.dumps({"version": "2.9", "entries": [{"record_id": "x"}]}), "malformed"),
    ],
)
def test_a_folder_with_nothing_usable_says_why(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "_dump_0").write_bytes(content)
    with pytest.raises(FlightRecorderError, match="Nothing in .* can be used") as caught:
        load_folder(tmp_path)
    assert sentence in str(caught.value)


def test_no_folder_and_an_empty_folder_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(FlightRecorderError, match="There is no folder"):
        load_folder(tmp_path / "none")
    with pytest.raises(FlightRecorderError, match="holds no Flight Recorder dumps"):
        load_folder(tmp_path)


def test_a_file_over_the_limit_is_left_out(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "_dump_0").write_bytes(b"\x80\x02" + b"N0" * (1 << 20) + b".")
    verdict = diagnose_folder(tmp_path, Limits(file_bytes=1 << 20))
    assert verdict.culprit_ranks == (2,)
    assert any("larger than 1 MiB" in warning for warning in verdict.warnings)


def test_the_newest_of_two_dumps_of_a_rank_counts(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "rank_2.json").write_text(json.dumps(dump([entry(0, seq=1), entry(9, seq=2, state="scheduled")])))
    verdict = diagnose_folder(tmp_path)
    assert any("Rank 2 has 2 dumps; took the newest, rank_2.json" in warning for warning in verdict.warnings)
    assert verdict.fault_class is FaultClass.COMMUNICATION_HANG
