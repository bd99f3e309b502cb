"""The loop: a resumed run is bit for bit the unbroken one, masks are the pattern's, mistakes are sentences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from apps.balanced_sparsity.config import BalancedSparsityConfig, TrainingConfig
from apps.balanced_sparsity.maps import layer_counts
from apps.balanced_sparsity.store import load_trained, save_trained
from apps.balanced_sparsity.training.loop import Job, run
from apps.balanced_sparsity.training.rates import learning_rate
from apps.balanced_sparsity.training.tasks import make_task
from apps.program.config import load_config
from apps.program.errors import UserError
from apps.training.worker import LocalWorker


def config_of(kind: str, *more: str) -> BalancedSparsityConfig:
    """Small versions of the three kinds of workload, with dropout, so that random numbers are drawn."""
    common = ["training.steps=12", "training.batch=20", "training.report_every=2", "training.checkpoint_every=4",
              "training.workers=0", "pruning.rise_steps=6", "pruning.every=2", "pruning.retrain_steps=6",
              "pruning.pattern=balanced:8", "pruning.begin_step=0"]  # fmt: skip
    own = {
        "vgg": ["model.vgg.stages=[[8],[16]]", "model.vgg.hidden=[16]", "model.vgg.dropout=0.3", "data.limit=200",
                "data.shift=1"],
        "speech_lstm": ["model.name=speech_lstm", "data.name=digit_rows", "model.lstm.hidden=16", "model.lstm.dropout=0.2"],
        "word_lstm": ["model.name=word_lstm", "data.name=docstrings", "data.limit=4000", "data.vocabulary=50", "data.sequence=20",
                      "model.lstm.hidden=16", "model.lstm.dropout=0.2", "training.optimizer=sgd", "training.momentum=0.9",
                      "training.clip_norm=1"],
    }  # fmt: skip
    return load_config(BalancedSparsityConfig, None, [*common, *own[kind], *more])


class Interrupted(Exception):
    """Stands for a process that ends."""


def stop_at(step: int):
    def told(entry):
        if entry["step"] == step:
            raise Interrupted

    return told


@pytest.mark.parametrize("kind", ["vgg", "speech_lstm", "word_lstm"])
@pytest.mark.parametrize("prune", [False, True])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(tmp_path, kind, prune):
    config = config_of(kind)
    start = None
    if prune:
        start = str(tmp_path / "start.pt")
        save_trained(tmp_path / "start.pt", run(Job(config), LocalWorker()))
    job = Job(config, prune, start)
    whole = run(job, LocalWorker(tmp_path / "whole"))
    # Ends after the report of step 6; the newest checkpoint is that of step 4, in the middle of the rise.
    with pytest.raises(Interrupted):
        run(job, LocalWorker(tmp_path / "broken", told=stop_at(6)))
    torch.manual_seed(123)  # what happened in between must not matter
    resumed = run(job, LocalWorker(tmp_path / "broken"))
    assert resumed.history == whole.history and resumed.figures == whole.figures
    assert whole.weights.keys() == resumed.weights.keys()
    assert all(torch.equal(whole.weights[name], resumed.weights[name]) for name in whole.weights)
    # A run that is done reports its end again, the same.
    again = run(job, LocalWorker(tmp_path / "broken"))
    assert again.figures == whole.figures and [entry["step"] for entry in again.history] == [2, 4, 6, 8, 10, 12]


def test_seeds_decide_everything():
    one, same, other = (run(Job(config_of("vgg", f"training.seed={seed}")), LocalWorker()) for seed in (1, 1, 2))
    assert all(torch.equal(one.weights[name], same.weights[name]) for name in one.weights)
    assert not torch.equal(one.weights["features.0.weight"], other.weights["features.0.weight"])


def test_a_balanced_network_has_the_same_number_in_every_block_and_an_unstructured_one_has_not(tmp_path):
    config = config_of("vgg")
    dense = run(Job(config), LocalWorker())
    save_trained(tmp_path / "model.pt", dense)
    assert all(count.zeros == 0 for count in layer_counts(dense.model(), 8))
    for pattern, equal in (("balanced:8", True), ("unstructured", False)):
        pruning = config.pruning.model_copy(update={"pattern": pattern, "skip": ("classifier",)})
        job = Job(config.model_copy(update={"pruning": pruning}), True, str(tmp_path))
        pruned = run(job, LocalWorker())
        counts = {count.name: count for count in layer_counts(pruned.model(), 8)}
        assert counts["classifier.0.weight"].zeros == 0
        inner = counts["features.4.weight"]  # 16 rows of 8 x 9 columns
        assert (inner.columns, inner.zeros) == (72, pytest.approx(0.75))
        assert (inner.least == inner.most == 2) is equal
        steps = [entry["sparsity"] for entry in pruned.history]
        assert steps == sorted(steps) and steps[0] < steps[-1] == pruned.sparsity


def test_the_loss_falls_and_pruning_in_one_shot_needs_no_steps(tmp_path):
    config = config_of(
        "vgg", "training.steps=60", "training.learning_rate=5e-3", "data.shift=0", "model.vgg.dropout=0.0"
    )
    dense = run(Job(config), LocalWorker())
    losses = [entry["loss"] for entry in dense.history]
    assert losses[-1] < 0.7 * losses[0] and dense.figures["accuracy"] > 0.4  # a guess is right in 0.1 of the cases
    save_trained(tmp_path / "model.pt", dense)
    pruning = config.pruning.model_copy(update={"rise_steps": 0, "retrain_steps": 0})
    shot = run(Job(config.model_copy(update={"pruning": pruning}), True, str(tmp_path)), LocalWorker())
    kept = shot.weights["features.4.weight"]
    assert shot.steps == 0 and float((kept == 0).float().mean()) == 0.75
    assert torch.equal(kept[kept != 0], dense.weights["features.4.weight"][kept != 0])


def test_the_language_models_perplexity_is_that_of_its_words():
    """Of a model whose weights are zero, every word is equally likely."""
    config, worker = config_of("word_lstm"), LocalWorker()
    task = make_task(config, worker)
    model = task.model()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        figures = task.figures(task.evaluate(model))
    assert figures["perplexity"] == pytest.approx(50, rel=1e-4)
    assert task.loss(model, 0).item() == pytest.approx(math.log(50), rel=1e-5)


def test_two_workers_see_the_batch_and_the_test_set_of_one():
    config = config_of("vgg", "data.shift=0", "model.vgg.batch_norm=false", "model.vgg.dropout=0.0")
    whole = make_task(config, LocalWorker())
    model = whole.model().eval()
    halves = []
    for rank in range(2):
        worker = LocalWorker()
        worker.rank, worker.world_size = rank, 2
        halves.append(make_task(config, worker))
    with torch.no_grad():
        losses = [half.loss(model, 3).item() for half in halves]
        assert sum(losses) / 2 == pytest.approx(whole.loss(model, 3).item(), rel=1e-5)
        sums = sum(half.evaluate(model) for half in halves)
        assert torch.allclose(sums, whole.evaluate(model))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("training.learning_rate=1e30", "loss is not finite"),
        ("training.batch=500", "batch is too large"),
        ("pruning.skip=[nothing]", "no nothing to skip"),
        ("pruning.pattern=diagonal", "a pattern is"),
        ("pruning.sparsity=0.95", "at most 0.875 sparse"),
        ("pruning.initial=0.9", "sparsity rises"),
    ],
)
def test_mistakes_are_sentences(tmp_path, more, says):
    config = config_of("vgg", "training.optimizer=sgd", more)
    prune = more.startswith("pruning")
    if prune:
        save_trained(tmp_path / "model.pt", run(Job(config_of("vgg", "training.steps=1")), LocalWorker()))
    with pytest.raises(UserError, match=says):
        run(Job(config, prune, str(tmp_path) if prune else None), LocalWorker())


def test_a_start_that_does_not_fit_and_none_at_all_are_sentences(tmp_path):
    other = run(Job(config_of("speech_lstm", "training.steps=1")), LocalWorker())
    save_trained(tmp_path / "model.pt", other)
    with pytest.raises(UserError, match="does not fit"):
        run(Job(config_of("vgg"), True, str(tmp_path)), LocalWorker())
    with pytest.raises(UserError, match="nothing to prune"):
        run(Job(config_of("vgg"), True), LocalWorker())
    loaded = load_trained(tmp_path)
    assert loaded.figures == other.figures and loaded.config == other.config
    broken = replace(loaded, weights={**loaded.weights, "classifier.bias": torch.zeros(3)})
    with pytest.raises(UserError, match="do not fit the configured model"):
        broken.model()


def test_rates_are_the_papers():
    zaremba = TrainingConfig(schedule="step", decay=1.2, decay_after_epochs=6)
    rates = [learning_rate(zaremba, 1.0, epoch * 100, 9999, 100) for epoch in range(9)]
    assert rates == pytest.approx([1.0] * 6 + [1 / 1.2, 1 / 1.2**2, 1 / 1.2**3])
    cosine = TrainingConfig(schedule="cosine", warmup_steps=10)
    assert learning_rate(cosine, 2.0, 0, 100, 10) == pytest.approx(0.2)
    assert learning_rate(cosine, 2.0, 50, 100, 10) == pytest.approx(1.0)
