"""Evaluation: pseudo-log-likelihood from the definition, readers of the tasks, fine-tuning learns, the mechanism's measures."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from apps.mcmisp.config import EvaluationConfig
from apps.mcmisp.data.prepare import prepare
from apps.mcmisp.data.shards import PackedRows
from apps.mcmisp.data.tokenizer import CLS, MASK, SEP, train_tokenizer
from apps.mcmisp.evaluation.blimp import Pair, accuracy, blimp_scores, pseudo_log_likelihoods, read_blimp, scored_tokens
from apps.mcmisp.evaluation.finetune import finetune
from apps.mcmisp.evaluation.masked import masked_loss
from apps.mcmisp.evaluation.mechanism import _top_tenth, mechanism
from apps.mcmisp.evaluation.tasks import Example, TextTask, read_rte, read_sst2
from apps.mcmisp.guidance import GuidanceConfig
from apps.mcmisp.model import MaskedLM, ModelConfig
from apps.mcmisp.statistics import paired_difference, reached_at, steps_to_loss_ratio, target_loss
from apps.mcmisp.tables import table_of
from apps.program.errors import UserError
from apps.training.worker import LocalWorker
from tests.apps.mcmisp.data.corpus import data_config, write_corpus


def small_model(vocab: int, positions: int = 32) -> MaskedLM:
    torch.manual_seed(0)
    model = MaskedLM(ModelConfig(layers=2, width=32, heads=4, max_positions=positions).spec(vocab))
    for parameter in model.parameters():  # far from even predictions
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


# ---- BLiMP


def test_pseudo_log_likelihood_is_the_sum_over_each_token_masked_alone():
    model = small_model(50)
    sentences = [([7, 9, 11], range(3)), ([8, 20, 21, 22, 30], range(1, 3)), ([6], range(1))]
    got = pseudo_log_likelihoods(model, sentences, torch.device("cpu"))
    for (ids, scored), value in zip(sentences, got, strict=True):
        expected = 0.0
        for i in scored:
            row = torch.tensor([[CLS, *ids, SEP]])
            row[0, i + 1] = MASK
            logits, _ = model(row, None, torch.tensor([i + 1]))
            expected += float(logits.log_softmax(-1)[0, ids[i]])
        assert value == pytest.approx(expected, abs=1e-4)


def test_only_the_differing_word_is_scored_where_one_differs():
    # who : dog+s bark -> dog bark ; words 0, 1 1, 2 against 0, 1, 2
    assert scored_tokens([5, 6, 7, 8], [5, 6, 8], [0, 1, 1, 2], [0, 1, 2]) == (range(1, 3), range(1, 2))
    assert scored_tokens([5, 6, 7], [5, 7, 6], [0, 1, 2], [0, 1, 2]) == (range(3), range(3))
    assert scored_tokens([5, 6], [5, 6, 7], [0, 1], [0, 1, 2]) == (range(2), range(3))


def test_blimp_is_read_and_averaged_over_tasks(tmp_path):
    for task, count in (("a", 3), ("b", 1)):
        lines = [
            json.dumps({"sentence_good": f"The cat sleeps {i}.", "sentence_bad": f"The cat sleep {i}."})
            for i in range(count)
        ]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines))
    pairs = read_blimp(tmp_path)
    assert len(pairs) == 4 and len(read_blimp(tmp_path, 1)) == 2
    tokenizer = train_tokenizer(["The cat sleeps. The cat sleep."] * 20, "bpe", 300)
    scores = blimp_scores(small_model(tokenizer.size), tokenizer, pairs, torch.device("cpu"))
    assert set(scores) == {"a", "b"} and len(scores["a"]) == 3
    swapped = [Pair(p.task, p.bad, p.good) for p in pairs]
    other = blimp_scores(small_model(tokenizer.size), tokenizer, swapped, torch.device("cpu"))
    assert all(x != y for task in scores for x, y in zip(scores[task], other[task], strict=True))
    assert accuracy({"a": [True, True, False], "b": [False]}) == pytest.approx(100 * (2 / 3) / 2)
    (tmp_path / "c.jsonl").write_text("{}")
    with pytest.raises(UserError, match="c.jsonl is no task of BLiMP"):
        read_blimp(tmp_path)
    with pytest.raises(UserError, match="There is no BLiMP"):
        read_blimp(tmp_path / "none")


@pytest.mark.shared_data
def test_real_sets_are_read(shared_data):
    text = shared_data / "text"
    assert len(read_blimp(text / "blimp_47.tar.xz")) == 47_000
    sst2 = read_sst2(text / "sst2")
    assert (len(sst2.train), len(sst2.test)) == (60_614, 872)
    rte = read_rte(text / "rte.tar.xz")
    assert (len(rte.train), len(rte.test)) == (567 + 400 + 800, 800 * 3)
    assert 0.45 < sum(e.label for e in rte.test) / len(rte.test) < 0.55


def test_tasks_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UserError, match=r"There is no .*train.tsv"):
        read_sst2(tmp_path)
    (tmp_path / "x_dev.xml").write_text("<a><pair value='TRUE'><t>x</t></pair></a>")
    with pytest.raises(UserError, match="lacks its text, hypothesis or answer"):
        read_rte(tmp_path)
    (tmp_path / "x_dev.xml").write_text("<a>")
    with pytest.raises(UserError, match="is no XML"):
        read_rte(tmp_path)


# ---- fine-tuning


def test_fine_tuning_learns_and_leaves_the_model_alone():
    tokenizer = train_tokenizer(["good film bad film fine dull"] * 20, "wordpiece", 100)
    words = {1: ["good", "fine"], 0: ["bad", "dull"]}
    examples = [Example(f"film {words[i % 2][i % 4 // 2]} film", "film" if i % 3 else None, i % 2) for i in range(96)]
    model = MaskedLM(ModelConfig(layers=1, width=32, heads=4, max_positions=32).spec(tokenizer.size))
    before = [p.clone() for p in model.parameters()]
    task = TextTask("toy", examples[:64], examples[64:])
    config = EvaluationConfig(epochs=12, batch=16, learning_rate=5e-3)
    result = finetune(model, tokenizer, task, config, seed=0)
    assert result.accuracy > 0.95 and result.majority == 0.5
    assert result == finetune(model, tokenizer, task, config, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# ---- masked loss and mechanism


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> PackedRows:
    path = tmp_path_factory.mktemp("evaluation")
    write_corpus(path / "text", 200)
    return prepare(data_config(path))


def test_the_masked_loss_of_an_ignorant_model_is_that_of_an_even_guess(rows):
    vocab = rows.manifest.vocab_size
    model = MaskedLM(ModelConfig(layers=1, width=32, heads=4, max_positions=32).spec(vocab))
    torch.nn.init.zeros_(model.head.dense.weight)
    found = masked_loss(model, PackedRows(rows.folder, "validation"), 40, LocalWorker())
    assert found["validation_loss"] == pytest.approx(math.log(vocab), abs=1e-4)
    assert model.training


def test_the_mechanism_counts_errors_and_ablates_the_guided_heads(rows):
    model = small_model(rows.manifest.vocab_size)
    validation = PackedRows(rows.folder, "validation")
    from actors.cooccurrence import CooccurrenceSettings

    table = table_of(rows, CooccurrenceSettings())
    found = mechanism(model, validation, table, GuidanceConfig(), 16)
    loss = masked_loss(model, validation, 16, LocalWorker())
    assert found.loss == pytest.approx(loss["validation_loss"])
    assert found.error_rate == pytest.approx(1 - loss["validation_accuracy"])
    assert 0 < found.mass_guided_heads < 1 and 0 < found.mass_other_heads < 1
    assert found.collocation_error_rate + found.other_error_rate == pytest.approx(found.error_rate)
    assert 0 <= found.collocation_error_rate <= found.error_rate
    assert found.ablated_loss != pytest.approx(found.loss, abs=1e-6)


def test_the_top_tenth_holds_the_highest_kept_scores():
    scores = torch.arange(20.0).expand(2, 20)
    kept = torch.ones(2, 20, dtype=torch.bool)
    kept[1, 15:] = False
    assert _top_tenth(scores, kept)[0].nonzero().flatten().tolist() == [18, 19]
    assert _top_tenth(scores, kept)[1].nonzero().flatten().tolist() == [13, 14]


# ---- statistics


def course(*losses: float) -> list[dict[str, float]]:
    return [{"step": 10 * (i + 1), "seconds": 5.0 * (i + 1), "validation_loss": loss} for i, loss in enumerate(losses)]


def test_steps_to_a_loss_are_interpolated():
    run = course(5.0, 4.0, 3.0)
    assert reached_at(run, 3.5) == 25 and reached_at(run, 3.5, "seconds") == 12.5
    assert reached_at(run, 6.0) == 10 and reached_at(run, 2.0) == math.inf
    assert target_loss(run) == 3.0 and target_loss(run, 0.7) == 4.0


def test_ratios_are_paired_by_seed_and_failures_count_against_the_arm():
    plain = {0: course(5.0, 4.0, 3.0), 1: course(6.0, 5.0, 4.0)}
    faster = {0: course(4.0, 3.0, 2.0), 1: course(5.0, 4.0, 3.0)}
    ratio = steps_to_loss_ratio(faster, plain, 1.0, 1000)
    assert ratio.value == pytest.approx(20 / 30) and ratio.low == pytest.approx(ratio.high) and ratio.seeds == 2
    assert steps_to_loss_ratio(plain, plain, 1.0, 1000).value == 1.0
    never = {0: course(9.0, 9.0, 9.0), 1: faster[1]}
    assert steps_to_loss_ratio(never, plain, 1.0, 1000).value == pytest.approx(math.sqrt(2 * 2 / 3))


def test_the_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        values = dict(enumerate(rng.normal(1.0, 1.0, 20)))
        interval = paired_difference(values, dict.fromkeys(values, 0.0), 400)
        covered += interval.low <= 1.0 <= interval.high
    assert 0.86 < covered / 200 <= 0.99
