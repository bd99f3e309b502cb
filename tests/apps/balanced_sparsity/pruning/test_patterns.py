"""Masks: exactly as many kept as the pattern says, for every float there is; against a brute-force choice."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.balanced_sparsity.pruning.patterns import Pattern, mask_of

SPECIAL = [0.0, -0.0, 1.0, 1.0, 2.0, 5e-324, float("inf"), -float("inf"), float("nan")]


def best(scores: list[float], keep: int) -> set[int]:
    """Places of the ``keep`` highest: NaN above all, of equal ones the first."""

    def key(place: int) -> tuple[float, float, int]:
        score = scores[place]
        return (0, 0, place) if math.isnan(score) else (1, -score, place)

    return set(sorted(range(len(scores)), key=key)[:keep])


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 41))
    values = draw(st.lists(st.sampled_from(SPECIAL), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values, dtype=torch.float32).view(rows, columns)


@settings(max_examples=60)
@given(matrices(), st.sampled_from([4, 5, 8, 32]), st.floats(0, 0.75))
def test_balanced_keeps_the_k_best_of_every_block(scores, block, sparsity):
    pattern = Pattern.balanced(block)
    mask = mask_of(scores, pattern, sparsity)
    k = pattern.kept(sparsity) if sparsity else block
    assert torch.equal(mask, mask_of(scores.clone(), pattern, sparsity))
    for row, kept in zip(scores.tolist(), mask.tolist(), strict=True):
        for start in range(0, len(row), block):
            part = row[start : start + block]
            assert {place for place, keeps in enumerate(kept[start : start + block]) if keeps} == best(
                part, min(k, len(part))
            )


@settings(max_examples=60)
@given(matrices(), st.floats(0, 0.99))
def test_unstructured_keeps_the_best_of_the_matrix(scores, sparsity):
    mask = mask_of(scores, Pattern.unstructured(), sparsity)
    keep = max(1, math.floor((1 - sparsity) * scores.numel() + 0.5 + 1e-9))
    assert set(mask.flatten().nonzero()[:, 0].tolist()) == best(scores.flatten().tolist(), keep)


@settings(max_examples=40)
@given(matrices(), st.integers(1, 4), st.integers(1, 9), st.floats(0.01, 0.99))
def test_blocks_are_kept_whole_by_their_mean(scores, height, width, sparsity):
    mask = mask_of(scores, Pattern.block(height, width), sparsity)
    tiles = [
        (slice(row, row + height), slice(column, column + width))
        for row in range(0, scores.shape[0], height)
        for column in range(0, scores.shape[1], width)
    ]
    means = [float(scores[tile].double().mean()) for tile in tiles]
    keep = max(1, math.floor((1 - sparsity) * len(tiles) + 0.5 + 1e-9))
    expected = torch.zeros_like(mask)
    for place in best(means, keep):
        expected[tiles[place]] = True
    assert int(sum(mask[tile].all() for tile in tiles)) == keep
    if not any(0 < abs(a - b) < 1e-12 * abs(a) for a in means for b in means):  # means that differ by rounding alone
        assert torch.equal(mask, expected)


def test_vectors_of_rows_share_their_choice():
    scores = torch.rand(10, 64, generator=torch.Generator().manual_seed(0))
    mask = mask_of(scores, Pattern.balanced(16, vector=4), 0.75)
    for start in (0, 4, 8):
        rows = mask[start : start + 4]
        assert torch.equal(rows, rows[:1].expand_as(rows))
        summed = scores[start : start + 4].double().sum(0).view(4, 16)
        assert torch.equal(
            rows[0].view(4, 16), torch.zeros(4, 16, dtype=bool).scatter_(1, summed.topk(4).indices, True)
        )


def test_2_4_keeps_two_of_four_at_half_and_more_before():
    scores = torch.rand(8, 16)
    assert (mask_of(scores, Pattern.two_four(), 0.5).view(8, 4, 4).sum(2) == 2).all()
    assert (mask_of(scores, Pattern.two_four(), 0.25).view(8, 4, 4).sum(2) == 3).all()
    with pytest.raises(ValueError, match=r"2:4 is at most 0.5 sparse, not 0.75"):
        mask_of(scores, Pattern.two_four(), 0.75)


@pytest.mark.parametrize("text", ["balanced:32", "balanced:32x4", "unstructured", "block:8x8", "2:4"])
def test_a_name_is_a_pattern_and_back(text):
    assert str(Pattern.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "balanced", "balanced:", "balanced:x4", "balanced:3", "balanced:512", "block:8", "block:0x4", "3:4", "2:4:8"],
)
def test_other_names_are_refused(text):
    with pytest.raises(ValueError):
        Pattern.parse(text)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 0.99, float("nan")])
def test_sparsities_that_cannot_be_are_refused(sparsity):
    with pytest.raises(ValueError):
        mask_of(torch.rand(4, 32), Pattern.balanced(32), sparsity)


def test_k_is_the_nearest():
    assert [Pattern.balanced(32).kept(s) for s in (0.0, 0.5, 0.75, 0.875, 0.9, 0.906, 0.96875)] == [
        32,
        16,
        8,
        4,
        3,
        3,
        1,
    ]


def test_wrong_scores_are_refused_and_empty_ones_are_not():
    with pytest.raises(ValueError, match="float matrix"):
        mask_of(torch.zeros(3), Pattern.unstructured(), 0.5)
    with pytest.raises(ValueError, match="float matrix"):
        mask_of(torch.zeros(3, 3, dtype=torch.int64), Pattern.unstructured(), 0.5)
    for pattern in (Pattern.balanced(4), Pattern.unstructured(), Pattern.block(2, 2)):
        assert mask_of(torch.zeros(0, 8), pattern, 0.5).shape == (0, 8)


def test_what_is_not_contiguous_or_half_precision_gives_the_same_mask():
    scores = torch.rand(32, 48).half()
    for pattern in (Pattern.balanced(16), Pattern.unstructured(), Pattern.block(4, 4)):
        assert torch.equal(mask_of(scores.T.contiguous().T, pattern, 0.5), mask_of(scores, pattern, 0.5))
        assert torch.equal(mask_of(scores.float(), pattern, 0.5), mask_of(scores, pattern, 0.5))
