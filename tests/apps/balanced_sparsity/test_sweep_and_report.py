"""The grid, the sweep and a training on Ray (one fit of each), and the report made again from what they left."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from apps.balanced_sparsity.cli import app
from apps.balanced_sparsity.config import SweepConfig
from apps.balanced_sparsity.pictures import TrialResult, block_size_figure
from apps.balanced_sparsity.report import read_sweep
from apps.balanced_sparsity.sweep import grid
from apps.program.errors import UserError

SMALL = ["training.steps=8", "training.batch=40", "training.report_every=4", "training.checkpoint_every=4", "data.limit=200",
         "model.vgg.stages=[[16],[16]]", "pruning.rise_steps=4", "pruning.every=2", "pruning.retrain_steps=4"]  # fmt: skip


def test_the_grid_is_each_pattern_at_each_sparsity_and_size():
    trials = grid(SweepConfig(sparsities=(0.5, 0.75), balanced_blocks=(16, 32), block_sizes=("8x8",), seeds=(1, 2)))
    assert len(trials) == len(set(trials)) == 2 * 2 * (2 + 1 + 1)
    assert {trial.pattern for trial in trials} == {"balanced:16", "balanced:32", "unstructured", "block:8x8"}
    with pytest.raises(UserError, match="block:RxC"):
        grid(SweepConfig(block_sizes=("8",)))


def test_sensitivity_to_the_block_size_needs_two_sizes():
    trials = [TrialResult(f"balanced:{size}", 0.75, 0.75, 1, 0.9, 1.0) for size in (16, 32)]
    assert block_size_figure(trials[:1], "accuracy", None) is None
    figure = block_size_figure(trials, "accuracy", 0.95)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["16", "32"]


def test_a_folder_that_is_no_sweeps_is_refused(tmp_path):
    (tmp_path / "result.json").write_text('{"kind": "train"}')
    with pytest.raises(UserError, match="no result of `sweep`"):
        read_sweep(tmp_path)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_train_and_sweep_on_ray(tmp_path, monkeypatch, ray_local, capsys):
    monkeypatch.setenv("SEXTANT_RUNS", str(tmp_path))
    runs = tmp_path / "balanced_sparsity"
    assert app.run(["train", *SMALL, "training.workers=2"]) == 0
    trained = (runs / "latest").resolve()
    told = json.loads((trained / "result.json").read_text())
    assert [entry["step"] for entry in told["history"]] == [4, 8] and told["figures"]["examples"] == 297
    assert "step      4" in capsys.readouterr().out  # the progress of the workers is seen here

    # balanced:4 is at most 75 % sparse: one of the three trials fails, and the others are kept.
    sweep = ["sweep.patterns=[balanced,unstructured]", "sweep.balanced_blocks=[4,16]", "sweep.sparsities=[0.8]"]
    assert app.run(["sweep", "--start", str(trained), *SMALL, *sweep]) == 1
    assert "1 of 3 trials failed (pruning: balanced:4 is at most 0.75 sparse" in capsys.readouterr().err
    folder = (runs / "latest").resolve()
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("- 4\n", "- 8\n"))
    assert app.run(["sweep", "--resume", str(folder)]) == 0
    trials, maps, score, dense, _ = read_sweep(folder)
    assert [trial.pattern for trial in trials] == ["balanced:8", "balanced:16", "unstructured"]
    assert score == "accuracy" and dense == pytest.approx(told["figures"]["accuracy"])
    assert all(0 <= trial.score <= 1 and math.isclose(trial.sparsity, wanted, abs_tol=0.02)
               for trial, wanted in zip(trials, (0.75, 0.8125, 0.8), strict=True))  # fmt: skip
    whole = maps["balanced:16"][:16, :48].reshape(16, 3, 16)
    assert np.array_equal((whole != 0).sum(axis=2), np.full((16, 3), 3))
    assert app.run(["report", str(folder)]) == 0
    assert (runs / "latest" / "weight_maps.png").is_file() and (
        runs / "latest" / "score_against_sparsity.png"
    ).is_file()
