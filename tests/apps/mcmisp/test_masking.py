"""Masking: exact counts, BERT's shares, the same whoever computes it; adaptive masking prefers what is mispredicted."""

from __future__ import annotations

import torch

from apps.mcmisp.data.tokenizer import MASK
from apps.mcmisp.masking import Difficulty, mask_rate, mask_rows, uniform

VOCAB = 200


def rows(count: int = 64, size: int = 100) -> torch.Tensor:
    ids = torch.randint(5, VOCAB, (count, size), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, 50], ids[:, 90:] = 2, 3, 0
    return ids


def test_numbers_are_uniform_and_belong_to_rows_steps_and_streams():
    draws = uniform(1, 2, torch.arange(500), 200)
    assert 0 <= draws.min() and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.003 and abs(draws.var() - 1 / 12) < 0.001
    assert abs(torch.corrcoef(torch.stack([draws[:-1].flatten(), draws[1:].flatten()]))[0, 1]) < 0.01
    assert torch.equal(draws[7:9], uniform(1, 2, torch.tensor([7, 8]), 200))
    others = [
        uniform(1, 3, torch.arange(500), 200),
        uniform(2, 2, torch.arange(500), 200),
        uniform(1, 2, torch.arange(500), 200, 1),
    ]
    assert all((draws == other).float().mean() < 1e-3 for other in others)


def test_the_share_is_exact_and_words_alone_are_masked():
    ids = rows()
    masked = mask_rows(ids, torch.arange(64), rate=0.15, seed=0, step=3, vocab_size=VOCAB)
    assert (masked.chosen_BS.sum(1) == round(88 * 0.15)).all()
    assert not masked.chosen_BS[ids < 5].any()
    assert torch.equal(masked.ids_BS[~masked.chosen_BS], ids[~masked.chosen_BS])
    assert torch.equal(masked.chosen_BS.flatten().nonzero().squeeze(1), masked.chosen_M)
    became, was = masked.ids_BS[masked.chosen_BS], ids[masked.chosen_BS]
    assert abs((became == MASK).float().mean() - 0.8) < 0.06
    assert abs((became == was).float().mean() - 0.1) < 0.05
    assert (became[became != MASK] >= 5).all()


def test_masks_belong_to_a_row_not_to_its_place_in_the_batch():
    ids = rows()
    whole = mask_rows(ids, torch.arange(64), rate=0.3, seed=0, step=3, vocab_size=VOCAB)
    part = mask_rows(ids[40:], torch.arange(40, 64), rate=0.3, seed=0, step=3, vocab_size=VOCAB)
    assert torch.equal(whole.ids_BS[40:], part.ids_BS)
    later = mask_rows(ids, torch.arange(64), rate=0.3, seed=0, step=4, vocab_size=VOCAB)
    assert not torch.equal(later.chosen_BS, whole.chosen_BS)


def test_adaptive_masking_prefers_words_that_are_mispredicted_at_the_same_rate():
    ids = rows(256)
    difficulty = Difficulty(VOCAB)
    hard = torch.arange(VOCAB) >= 100
    seen = torch.full((VOCAB,), 1000.0)
    difficulty.observe(seen, torch.where(hard, 900.0, 200.0))
    plain = mask_rows(ids, torch.arange(256), rate=0.15, seed=0, step=0, vocab_size=VOCAB)
    adaptive = mask_rows(ids, torch.arange(256), rate=0.15, seed=0, step=0, vocab_size=VOCAB, difficulty=difficulty)
    assert torch.equal(adaptive.chosen_BS.sum(1), plain.chosen_BS.sum(1))
    share = lambda m: hard[ids[m.chosen_BS]].float().mean()  # noqa: E731
    assert abs(share(plain) - 0.51) < 0.03 and share(adaptive) > 0.7
    again = Difficulty(VOCAB)
    again.load_state_dict(difficulty.state_dict())
    assert torch.equal(again.weights(ids), difficulty.weights(ids))
    even = Difficulty(VOCAB, strength=0.0)
    assert torch.equal(
        mask_rows(ids, torch.arange(256), rate=0.15, seed=0, step=0, vocab_size=VOCAB, difficulty=even).chosen_BS,
        plain.chosen_BS,
    )


def test_the_rate_falls_linearly():
    assert [round(mask_rate(s, 11, 0.3, 0.15), 4) for s in (0, 5, 10, 99)] == [0.3, 0.225, 0.15, 0.15]
