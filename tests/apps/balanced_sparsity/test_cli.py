"""The verbs on scikit-learn's digits, end to end without Ray, and users' mistakes as one line each."""

from __future__ import annotations

import json

import pytest

from apps.balanced_sparsity.cli import app
from apps.balanced_sparsity.config import BalancedSparsityConfig
from apps.program.config import load_config, presets

SMALL = ["training.workers=0", "training.steps=40", "training.learning_rate=1e-2", "data.limit=600",
         "model.vgg.stages=[[16],[16]]", "pruning.rise_steps=10", "pruning.retrain_steps=10"]  # fmt: skip


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SEXTANT_RUNS", str(tmp_path))
    return tmp_path / "balanced_sparsity"


def newest(runs):
    return (runs / "latest").resolve()


def result(folder):
    return json.loads((folder / "result.json").read_text())


def fails(capsys, *arguments) -> str:
    assert app.run(arguments) != 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("balanced_sparsity: "), lines
    return lines[0]


def test_train_prune_evaluate_export(runs, capsys):
    assert app.run(["train", *SMALL]) == 0
    dense = newest(runs)
    assert result(dense)["figures"]["accuracy"] > 0.3 and result(dense)["pattern"] is None
    assert all((dense / name).is_file() for name in ("model.pt", "config.yaml", "report.html", "course.png"))

    # `latest` moves on when the pruning makes a folder of its own; the start is what it pointed at before.
    assert app.run(["prune", "--start", str(runs / "latest"), *SMALL]) == 0
    pruned = newest(runs)
    told = result(pruned)
    assert (
        pruned != dense
        and told["pattern"] == "balanced:32"
        and told["sparsity"] == pytest.approx(1 - (4 * 8 + 8) / 144)
    )
    # The last block of 144 columns has 16, of which 8 are kept as of a whole one.
    assert [(layer["least"], layer["most"]) for layer in told["layers"]] == [(8, 8)]
    assert "data:image/png;base64," in (pruned / "report.html").read_text()

    assert app.run(["export", "--start", str(pruned)]) == 0
    exported = newest(runs)
    packing = result(exported)
    assert packing["packed_weights"] == 1 and packing["packed_score"] == packing["pruned_score"]
    assert packing["file_bytes"] == (exported / "packed.safetensors").stat().st_size

    assert app.run(["evaluate", "--start", str(pruned), "--packed", str(exported / "packed.safetensors")]) == 0
    assert result(newest(runs))["figures"]["accuracy"] == pytest.approx(told["figures"]["accuracy"])

    # A run that is done, resumed, says the same again.
    assert app.run(["prune", "--resume", str(pruned)]) == 0
    assert result(pruned)["figures"] == told["figures"]

    capsys.readouterr()
    assert "only balanced patterns" not in fails(capsys, "export", "--start", str(dense))
    assert "dense" in fails(capsys, "export", "--start", str(dense))
    assert "value type" in fails(capsys, "export", "--start", str(pruned), "--value-type", "fp8")
    (exported / "packed.safetensors").write_bytes(b"cut")
    assert "safetensors" in fails(
        capsys, "evaluate", "--start", str(pruned), "--packed", str(exported / "packed.safetensors")
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "data.name=cifar10"], "data.train names no data"),
        (["train", "data.name=docstrings"], "takes data.name digits or cifar10 or image_folder"),
        (["train", "training.batch=7", "training.workers=2"], "cannot be divided"),
        (["train", "pruning.sparsity=1.5"], "pruning.sparsity"),
        (["prune"], "--start"),
        (["prune", "pruning.pattern=checkered"], "balanced:B"),
        (["prune", "--start", "missing/model.pt"], "There is no checkpoint"),
        (["prune", "--resume", "missing"], "no run folder"),
        (["evaluate"], "--start"),
        (["sweep"], "--start"),
        (["sweep", "sweep.balanced_blocks=[2]"], "4 to 256 columns"),
        (["report", "missing"], "no result.json"),
        (["serve"], "--start"),
        (["serve", "--start", "missing/model.pt"], "There is no checkpoint"),
        (["serve", "serving.port=0"], "serving.port"),
        (["sparsify"], "--out"),
        (["train", "--config", "speaker", "training.workers=0"], "no data at timit_sample"),
    ],
)
def test_mistakes_are_one_line(runs, capsys, monkeypatch, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    workers = [] if arguments[-1].startswith("training.workers") or arguments[0] != "train" else ["training.workers=0"]
    assert says in fails(capsys, *arguments, *workers)


def test_every_preset_resolves():
    names = presets("balanced_sparsity")
    assert {
        "cpu",
        "gpu",
        "cluster",
        "vgg16_imagenet",
        "lstm_medium",
        "lstm_large",
        "speaker",
        "smollm2",
        "lstm_server",
    } <= set(names)
    for name in names:
        load_config(BalancedSparsityConfig, name, system="balanced_sparsity")
    large = load_config(BalancedSparsityConfig, "lstm_large", system="balanced_sparsity")
    lstm, training = large.model.lstm, large.training
    assert (lstm.hidden, lstm.dropout, training.decay, training.clip_norm) == (1500, 0.65, 1.15, 10)
