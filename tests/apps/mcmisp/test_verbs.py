"""The command line: each verb on a small corpus, and mistakes in one sentence."""

from __future__ import annotations

import json

import pytest

from apps.mcmisp import __main__ as program
from tests.apps.mcmisp.data.corpus import write_corpus

program._add_verbs()


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    path = tmp_path_factory.mktemp("verbs")
    write_corpus(path / "text", 150)
    return path


def settings(where) -> list[str]:
    return [
        "data.source=folder", f"data.folder={where / 'text'}", "data.document=line", "data.vocab_size=300",
        "data.row_tokens=32",
        "data.window_rows=64", "data.validation_fraction=0.1", f"data.cache={where / 'cache'}", "model.layers=2",
        "model.width=32",
        "model.heads=4", "training.steps=8", "training.batch=8", "training.evaluate_every=4", "training.evaluation_rows=16",
        "training.checkpoint_every=4", "training.report_every=4", "guidance.start_error_rate=1.0",
    ]  # fmt: skip


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SEXTANT_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs" / "mcmisp" / "latest"


def test_pretrain_then_evaluate_report_and_finetune(where, runs, capsys, tmp_path):
    assert program.app.run(["pretrain", *settings(where)]) == 0
    result = json.loads((runs / "result.json").read_text())
    assert result["arm"] == "guided" and result["figures"]["validation_loss"] > 0 and len(result["history"]) == 2
    assert (runs / "model.pt").exists() and (runs / "report.html").exists()
    run = str(runs.resolve())
    assert program.app.run(["report", run]) == 0
    assert program.app.run(["pretrain", "--resume", run, *settings(where)]) == 0  # nothing is left to do
    assert program.app.run(["evaluate", "--model", run, *settings(where)]) == 0
    found = json.loads((runs / "result.json").read_text())["figures"]
    assert found["validation_loss"] == pytest.approx(result["figures"]["validation_loss"], abs=1e-6)
    lines = "\n".join(f"the cat likes {'milk' if i % 2 else 'bone'}\t{i % 2}" for i in range(40))
    for name in ("train", "test"):
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\n" + lines)
    assert (
        program.app.run(
            ["finetune", "--model", run, f"evaluation.sst2={tmp_path}", "evaluation.batch=8", *settings(where)]
        )
        == 0
    )
    assert program.app.run(["finetune", "--model", run, *settings(where)]) == 1
    assert "set evaluation.sst2 or evaluation.rte" in capsys.readouterr().err


def test_cooccurrence_is_built_and_shown(where, runs, capsys):
    assert program.app.run(["cooccurrence", "--build", "--show", "cat", *settings(where)]) == 0
    shown = capsys.readouterr().out
    assert "milk" in shown and "dense" in shown
    assert program.app.run(["cooccurrence", "--show", "zyzzyva", *settings(where)]) == 1
    assert "is no token of this vocabulary" in capsys.readouterr().err


def test_mistakes_are_one_sentence(where, runs, capsys, tmp_path):
    cases = {
        ("training.batch=100000",): "fewer than training.batch",
        ("model.max_positions=16",): "more than model.max_positions",
        ("cooccurrence.layout=dense", "cooccurrence.dense_limit=100"): "beyond cooccurrence.dense_limit",
        (f"data.folder={tmp_path / 'none'}",): "is no folder",
        ("guidance.target=nonsense",): "Allowed: rare, random, reversed, contrast",
    }
    for overrides, sentence in cases.items():
        assert program.app.run(["pretrain", *settings(where), *overrides]) != 0
        assert sentence in capsys.readouterr().err
    assert program.app.run(["evaluate", "--model", str(tmp_path)]) == 1
    assert "There is no checkpoint" in capsys.readouterr().err
