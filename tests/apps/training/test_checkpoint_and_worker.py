"""Checkpoints come back bit for bit, foreign files are refused without being run, and a process without Ray keeps two of them."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from apps.program.errors import UserError
from apps.training.checkpoint import load_tensors, read_checkpoint, save_tensors, write_checkpoint
from apps.training.progress import followed
from apps.training.worker import LocalWorker


def test_a_checkpoint_puts_state_and_generators_back(tmp_path):
    torch.manual_seed(5)
    write_checkpoint(tmp_path, 0, {"step": 3, "model": {"w": torch.arange(4.0)}}, {"carry": [torch.ones(2)]})
    wanted = torch.rand(3)
    torch.rand(100)
    common, own = read_checkpoint(tmp_path, 0)
    assert torch.equal(torch.rand(3), wanted)
    assert common["step"] == 3 and torch.equal(common["model"]["w"], torch.arange(4.0))
    assert torch.equal(own["carry"][0], torch.ones(2))


def test_a_rank_without_a_part_of_its_own_leaves_its_generators_alone(tmp_path):
    write_checkpoint(tmp_path, 0, {"step": 1}, {})
    torch.manual_seed(9)
    wanted = torch.Generator().manual_seed(9)
    _, own = read_checkpoint(tmp_path, 1)
    assert own is None and torch.equal(torch.rand(3), torch.rand(3, generator=wanted))


class _Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", pickle.dumps(_Evil())])
def test_what_is_no_checkpoint_is_a_sentence_and_runs_nothing(tmp_path, content, capsys):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match="no checkpoint"):
        load_tensors(tmp_path / "x.pt")
    assert "must not run" not in capsys.readouterr().out
    with pytest.raises(UserError, match="There is no checkpoint"):
        load_tensors(tmp_path / "missing.pt")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(Exception):  # whatever torch says of a thing that it cannot write
        save_tensors(tmp_path / "x.pt", lambda: None)
    assert list(tmp_path.iterdir()) == []


def test_two_checkpoints_are_kept_and_an_unfinished_one_is_never_taken(tmp_path):
    worker = LocalWorker(tmp_path)
    for step in (10, 20, 100):
        worker.report({"step": step}, lambda folder: (folder / "a").write_text("x") and None)
    (tmp_path / ".checkpoint-00000200").mkdir()
    with worker.newest() as folder:
        assert folder is not None and folder.name == "checkpoint-00000100"
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-00000020", "checkpoint-00000100"]
    assert [entry["step"] for entry in worker.history] == [10, 20, 100]


def test_reports_are_followed_to_the_last_line_and_what_the_listener_raises_is_raised(tmp_path):
    path, heard = tmp_path / "reports.jsonl", []
    with followed(path, heard.append, poll_s=0.01), path.open("w") as file:
        for step in range(3):
            file.write(json.dumps({"step": step}) + "\n")
            file.flush()
    assert [entry["step"] for entry in heard] == [0, 1, 2]

    def refuse(entry):
        raise UserError("enough")

    with pytest.raises(UserError, match="enough"), followed(path, refuse, poll_s=0.01):
        pass
