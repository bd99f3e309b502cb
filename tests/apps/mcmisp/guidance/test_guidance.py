"""Guidance: each named choice does what its name says, and the back ends agree whatever is chosen."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from actors.cooccurrence import CooccurrenceSettings, Lexicon, build_table, count_pairs
from apps.mcmisp.guidance import Errors, GuidanceConfig, Guide, WeightSchedule
from apps.mcmisp.guidance.choice import guided_heads
from apps.mcmisp.guidance.target import divergence, target_log_weights
from apps.mcmisp.model import Encoder, ModelConfig
from apps.program.errors import UserError
from kernels.guided_attention import Rows, kept_keys

VOCAB = 30
LEXICON = Lexicon(VOCAB, (0, 1))


def table():
    ids = np.minimum(np.random.default_rng(0).geometric(0.12, (60, 30)) + 1, VOCAB - 1)
    settings = CooccurrenceSettings()
    return build_table(count_pairs(ids, np.zeros_like(ids), LEXICON, settings), LEXICON, settings)


TABLE = table()
UNIGRAM = torch.from_numpy(TABLE.marginals / TABLE.marginals.sum())


def guide(**options) -> Guide:
    return Guide(GuidanceConfig(**options), TABLE, UNIGRAM, (0, 1))


def batch(size: int = 24, count: int = 3):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCAB, (count, size), generator=g)
    ids[:, 0] = 1
    document = torch.tensor([[0] * (size // 3) + [1] * (size - size // 3)] * count)
    chosen = torch.rand(count, size, generator=g) < 0.3
    chosen[:, 0] = False
    return ids, document, chosen


def errors_of(one: Guide, ids, document, chosen) -> Errors:
    rows = Rows.at(chosen)
    g = torch.Generator().manual_seed(1)
    wrong = torch.randint(2, VOCAB, (len(rows),), generator=g)
    right = ids[rows.sequence_E, rows.position_E]
    return Errors(rows, wrong, right, torch.rand(len(rows), generator=g), one.kept(ids, chosen))


# ---- the target


@pytest.mark.parametrize("shape", ["softmax", "linear", "median"])
def test_a_target_is_a_distribution_over_kept_keys_that_falls_with_badness(shape):
    badness = torch.tensor([[3.0, 1.0, 2.0, 0.0, 9.0], [1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    kept = torch.tensor([[True, True, True, True, False], [True, True, False, True, False], [False] * 5])
    g = target_log_weights(badness, kept, GuidanceConfig(shape=shape)).exp()
    torch.testing.assert_close(g.sum(-1), torch.tensor([1.0, 1.0, 0.0]))
    assert g[0, 3] >= g[0, 1] >= g[0, 2] >= g[0, 0] and g[0, 3] > g[0, 0] and g[0, 4] == 0
    torch.testing.assert_close(g[1], torch.tensor([1 / 3, 1 / 3, 0, 1 / 3, 0]))


def test_targets_by_hand():
    badness, kept = torch.tensor([[0.0, 2.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool)
    by = lambda **o: target_log_weights(badness, kept, GuidanceConfig(**o)).exp()[0]  # noqa: E731
    raw = torch.tensor([1.0, math.exp(-1), math.exp(-2)])
    torch.testing.assert_close(by(temperature=2.0), raw / raw.sum())
    torch.testing.assert_close(by(shape="linear"), torch.tensor([2 / 3, 1 / 3, 0]))
    torch.testing.assert_close(by(shape="median"), torch.tensor([0.5, 0.5, 0]))


def test_divergences_by_hand():
    g, a = torch.tensor([[0.75, 0.25, 0.0]]), torch.tensor([[[0.5, 0.3, 0.2]]])
    kept = torch.ones(1, 3, dtype=torch.bool)
    value = lambda kind: float(divergence(kind, g.log(), a.log(), kept))  # noqa: E731
    assert value("kl") == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.25 / 0.3))
    assert value("mse") == pytest.approx(0.0625 + 0.0025 + 0.04)
    cross = 0.75 * math.log(0.5) + 0.25 * math.log(0.5) + 0.25 * math.log(0.3) + 0.75 * math.log(0.7) + math.log(0.8)
    assert value("bce") == pytest.approx(-cross / 3)


def test_what_each_target_takes_for_bad():
    ids, document, chosen = batch()
    base = guide()
    e = errors_of(base, ids, document, chosen)
    keys = ids[e.rows.sequence_E]
    wrong, right = TABLE.scores(e.wrong_E, keys), TABLE.scores(e.right_E, keys)
    torch.testing.assert_close(base.badness(e, ids), wrong)
    torch.testing.assert_close(guide(target="reversed").badness(e, ids), -wrong)
    torch.testing.assert_close(guide(target="contrast").badness(e, ids), wrong - right)
    assert not torch.allclose(guide(target="random").badness(e, ids), wrong)


def test_the_random_control_draws_words_by_their_frequency():
    one = guide(target="random")
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    words = one._drawn(Errors(None, None, None, draws, None))
    torch.testing.assert_close(torch.bincount(words, minlength=VOCAB) / 20_000, UNIGRAM.float(), atol=0.012, rtol=0)


# ---- keys, gate, heads, weight


def test_kept_keys_are_visible_words_of_the_same_document():
    ids, document, chosen = batch()
    one = guide()
    e = errors_of(one, ids, document, chosen)
    kept = kept_keys(e.rows, e.kept_BS, document)
    for row, (b, i) in enumerate(zip(e.rows.sequence_E.tolist(), e.rows.position_E.tolist(), strict=True)):
        for j in range(ids.shape[1]):
            expected = document[b, j] == document[b, i] and not chosen[b, j] and ids[b, j] > 1
            assert bool(kept[row, j]) == bool(expected)
    assert guide(mask_keys="in").kept(ids, chosen).sum() == (ids > 1).sum()


def test_the_gate_lets_through_what_is_more_probable_than_its_frequency_says():
    words = torch.tensor([2, 3])
    usual = UNIGRAM[words]
    one = guide(gate_factor=2.0)
    assert one.gate(words, torch.stack([usual[0] * 2.01, usual[1] * 1.99])).tolist() == [True, False]
    assert guide(gate="all").gate(words, torch.zeros(2)).all()


def test_heads_and_layers():
    assert guided_heads(GuidanceConfig(), 4, 4) == {0: (0,), 1: (0,), 2: (0,), 3: (0,)}
    assert guided_heads(GuidanceConfig(layers="upper"), 12, 12) == dict.fromkeys(range(6, 12), (0, 1, 2))
    assert list(guided_heads(GuidanceConfig(layers="lower"), 1, 2)) == [0]
    assert list(guided_heads(GuidanceConfig(layers="middle"), 12, 12)) == list(range(3, 9))
    assert guided_heads(GuidanceConfig(layers=[1], heads=2), 2, 2) == {1: (0, 1)}
    with pytest.raises(UserError, match="layers are 0 to 1"):
        guided_heads(GuidanceConfig(layers=[2]), 2, 2)
    with pytest.raises(UserError, match=r"guidance.heads=3, but a layer has 2"):
        guided_heads(GuidanceConfig(heads=3), 2, 2)


def test_the_weight_waits_for_mistakes_that_say_something_then_rises_and_fades():
    schedule = WeightSchedule(GuidanceConfig(weight=2.0, warmup_steps=3, start_error_rate=0.9), steps=110)
    for step in range(5):
        assert schedule.weight(step) == 0
        schedule.observe(step, 0.96)
    step = 5
    while schedule.started_at is None:
        schedule.observe(step, 0.5)
        step += 1
    assert schedule.error_rate < 0.9 and schedule.started_at == step
    assert [schedule.weight(step + i) for i in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert schedule.weight(109) < 0.05 and schedule.weight(110) == 0
    again = WeightSchedule(schedule.config, 110)
    again.load_state_dict(schedule.state_dict())
    assert again.weight(60) == schedule.weight(60) > 0
    constant = WeightSchedule(GuidanceConfig(schedule="constant", start_error_rate=1.0), 10)
    assert [constant.weight(step) for step in (0, 9)] == [1.0, 1.0]


# ---- the loss


CHOICES = list(
    itertools.product(["rare", "contrast"], ["softmax", "linear", "median"], ["kl", "mse", "bce"], [True, False])
)


@pytest.mark.parametrize("target,shape,kind,renormalise", CHOICES)
def test_the_back_ends_agree_in_loss_and_gradients_whatever_is_chosen(target, shape, kind, renormalise):
    ids, document, chosen = batch()
    results = []
    for backend in ("maps", "rows", "fused"):
        if backend == "fused" and (shape, kind) != ("softmax", "kl"):
            continue
        torch.manual_seed(0)
        model = Encoder(ModelConfig(layers=2, width=32, heads=4).spec(VOCAB))
        for layer in model.layers:  # attention that is far from even
            torch.nn.init.normal_(layer.attention.qkv.weight, std=0.3)
        one = guide(target=target, shape=shape, divergence=kind, renormalise=renormalise, backend=backend, heads=2)
        _, captures = model(ids, document, guided=one.heads(2, 4), backend=one.backend(ids.shape[1], ids.device))
        e = errors_of(one, ids, document, chosen)
        result = one.loss(captures, e, document, ids)
        loss = result.total / result.errors
        loss.backward()
        results.append((loss, *(p.grad for p in model.parameters() if p.grad is not None)))
    assert float(results[0][0]) > 1e-4
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_learning_the_loss_alone_moves_attention_to_rare_companions():
    ids, document, chosen = batch()
    torch.manual_seed(0)
    model = Encoder(ModelConfig(layers=1, width=32, heads=4).spec(VOCAB))
    one = guide()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        _, captures = model(ids, document, guided=one.heads(1, 4), backend="maps")
        result = one.loss(captures, errors_of(one, ids, document, chosen), document, ids)
        loss = result.total / result.errors
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_without_errors_the_loss_is_zero_and_can_be_differentiated():
    ids, document, chosen = batch()
    model = Encoder(ModelConfig(layers=1, width=32, heads=4).spec(VOCAB))
    one = guide()
    _, captures = model(ids, document, guided=one.heads(1, 4), backend="rows")
    result = one.loss(captures, errors_of(one, ids, document, torch.zeros_like(chosen)), document, ids)
    result.total.backward()
    assert result.errors == 0 and float(result.total) == 0


def test_the_fused_back_end_is_refused_where_it_does_not_apply():
    with pytest.raises(UserError, match="needs shape=softmax"):
        guide(backend="fused", divergence="mse")
