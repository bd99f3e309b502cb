"""`python -m apps.c4 diagnose` as a user meets it: a short report, one JSON object, one line for a mistake."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from apps.c4.diagnose import diagnose
from apps.program.cli import program
from tests.actors.c4.flight_recorder.dumps import dump, entry

WAITING = [entry(0, seq=1), entry(1, seq=2, state="scheduled")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for rank in range(4):
        (tmp_path / f"_dump_{rank}").write_bytes(pickle.dumps(dump(WAITING[:1] if rank == 2 else WAITING)))
    return tmp_path


def run(*arguments: str) -> int:
    app = program("c4", "C4.")
    app.verb(diagnose)
    return app.run(["diagnose", *arguments])


def test_json_is_one_object_with_the_promised_keys(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(str(folder), "--json") == 0
    out = capsys.readouterr().out
    verdict = json.loads(out)
    assert out.count("\n") == 1
    assert verdict["culprit_ranks"] == [2]
    assert verdict["class"] == "non_communication_hang"
    assert verdict["process_group"] == "0:default_pg"
    assert verdict["evidence"]
    assert all(isinstance(sentence, str) for sentence in verdict["evidence"])


def test_the_report_names_culprit_group_and_operation(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(str(folder)) == 0
    out = capsys.readouterr().out
    for word in ("culprit ranks", "2", "0:default_pg", "all_reduce #2", "Evidence"):
        assert word in out


def test_healthy_dumps_end_with_zero_and_no_culprits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for rank in range(4):
        (tmp_path / f"_dump_{rank}").write_bytes(pickle.dumps(dump([entry(0, seq=1)])))
    assert run(str(tmp_path), "--json") == 0
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["culprit_ranks"], verdict["class"]) == ([], "healthy")


@pytest.mark.parametrize("what", ["missing", "empty", "hostile", "truncated"])
def test_unusable_input_is_one_line_and_a_code(tmp_path: Path, what: str, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "touched.log"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {target}",)

    folder = tmp_path / "dumps"
    if what != "missing":
        folder.mkdir()
    if what == "hostile":
        (folder / "_dump_0").write_bytes(pickle.dumps(Payload()))
    if what == "truncated":
        (folder / "_dump_0").write_bytes(pickle.dumps(dump(WAITING))[:90])
    assert run(str(folder), "--json") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("c4: ")
    assert captured.err.count("\n") == 1
    assert not target.exists()


def test_the_module_runs_from_the_shell(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "apps.c4", "diagnose", str(folder), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["culprit_ranks"] == [2]


def test_limits_come_from_the_configuration(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(str(folder), "--json", "dumps.max_file_mib=1", "dumps.max_files=2") == 1
    assert "at most 2 are read" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["cpu", "gpu", "cluster"])
def test_every_preset_is_valid(preset: str) -> None:
    from apps.c4.config import C4Config
    from apps.program.config import load_config

    assert load_config(C4Config, preset, [], system="c4").dumps.max_file_mib >= 1
