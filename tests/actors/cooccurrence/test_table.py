"""The table: PMI by hand, both layouts the same bits, saved and loaded, and what does not fit is refused."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch

from actors.cooccurrence import CooccurrenceError, CooccurrenceSettings, Lexicon, PairTable, build_table, count_pairs

VOCAB = 40
LEXICON = Lexicon(VOCAB, (0,))


def counts(settings: CooccurrenceSettings, rows: int = 30, seed: int = 0):
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.geometric(0.1, (rows, 25)), VOCAB - 1)
    return count_pairs(ids, np.zeros_like(ids), LEXICON, settings)


def test_pmi_by_hand():
    """a b a b: window 1 gives C[a,b] = 3 unordered. Ordered pairs N = 6, n_a = n_b = 3; pmi(a,b) = log(3.1 * 6 / 9)."""
    settings = CooccurrenceSettings(window=1)
    ids = np.array([[5, 7, 5, 7]])
    table = build_table(count_pairs(ids, np.zeros_like(ids), LEXICON, settings), LEXICON, settings)
    assert (table.pairs, table.units, table.marginals[5], table.marginals[7]) == (6, 4, 3, 3)
    for pair, expected in {
        (5, 7): math.log(3.1 * 6 / 9),
        (5, 5): math.log(0.1 * 6 / 9),
        (9, 5): math.log(0.1 * 6 / 3),
    }.items():
        got = float(table.scores(torch.tensor([pair[0]]), torch.tensor([[pair[1]]])))
        assert abs(got - expected) <= table.step / 2 + 1e-6


def test_a_word_beside_itself_is_two_ordered_pairs():
    settings = CooccurrenceSettings(window=1, normalisation="raw")
    ids = np.array([[5, 5, 7]])
    table = build_table(count_pairs(ids, np.zeros_like(ids), LEXICON, settings), LEXICON, settings)
    assert table.marginals[[5, 7]].tolist() == [3, 1]
    assert table.row(5)[5] == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("normalisation", ["raw", "log", "conditional", "pmi", "ppmi"])
def test_dense_and_csr_are_the_same_bits(normalisation):
    dense = CooccurrenceSettings(normalisation=normalisation, layout="dense", min_count=2)
    sparse = CooccurrenceSettings(normalisation=normalisation, layout="csr", min_count=2)
    tables = [build_table(counts(one), LEXICON, one) for one in (dense, sparse)]
    words = torch.arange(VOCAB)
    keys = words.expand(VOCAB, VOCAB)
    a, b = (table.scores(words, keys) for table in tables)
    assert torch.equal(a, b)
    assert len(torch.unique(a)) > 5
    if normalisation != "conditional":
        assert torch.equal(a, a.T)


def test_conditional_is_the_share_of_the_predicted_words_pairs():
    settings = CooccurrenceSettings(normalisation="conditional")
    table = build_table(counts(settings), LEXICON, settings)
    frequent = int(table.marginals.argmax())
    assert table.row(frequent).sum() == pytest.approx(1.0, abs=VOCAB * table.step / 2)


def test_saved_and_loaded_it_is_the_same_version(tmp_path):
    for layout in ("dense", "csr"):
        settings = CooccurrenceSettings(layout=layout)
        table = build_table(counts(settings), LEXICON, settings, snapshot=3)
        table.save(tmp_path / "table.npz")
        again = PairTable.load(tmp_path / "table.npz")
        assert again.version == table.version
        assert again.settings == settings and again.snapshot == 3
        again.require(LEXICON, settings)
        table.scores(torch.tensor([1]), torch.tensor([[2]]))
        assert pickle.loads(pickle.dumps(table)).version == table.version


def test_a_table_of_other_counts_is_another_version():
    settings = CooccurrenceSettings()
    assert (
        build_table(counts(settings), LEXICON, settings).version
        == build_table(counts(settings), LEXICON, settings).version
    )
    assert (
        build_table(counts(settings), LEXICON, settings).version
        != build_table(counts(settings, seed=1), LEXICON, settings).version
    )


def test_what_is_refused(tmp_path):
    settings = CooccurrenceSettings(layout="dense", dense_limit=30)
    with pytest.raises(CooccurrenceError, match=r"40 x 40 pairs is beyond cooccurrence.dense_limit 30.*layout=csr"):
        build_table(counts(settings), LEXICON, settings)
    assert build_table(counts(settings), LEXICON, CooccurrenceSettings(dense_limit=30)).keys is not None
    empty = count_pairs(np.zeros((1, 5), int), np.zeros((1, 5), int), LEXICON, settings)
    with pytest.raises(CooccurrenceError, match="corpus is empty"):
        build_table(empty, LEXICON, CooccurrenceSettings())
    with pytest.raises(CooccurrenceError, match="There is no co-occurrence table"):
        PairTable.load(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"hello")
    with pytest.raises(CooccurrenceError, match="no co-occurrence table that can be read"):
        PairTable.load(tmp_path / "bad.npz")
    table = build_table(counts(CooccurrenceSettings()), LEXICON, CooccurrenceSettings())
    with pytest.raises(CooccurrenceError, match="counted otherwise .window=8"):
        table.require(LEXICON, CooccurrenceSettings(window=4))
    with pytest.raises(CooccurrenceError, match="of 40 words, the tokenizer of 41"):
        table.require(Lexicon(41), CooccurrenceSettings())


def test_a_damaged_file_is_refused(tmp_path):
    settings = CooccurrenceSettings()
    table = build_table(counts(settings), LEXICON, settings)
    table.save(tmp_path / "t.npz")
    data = bytearray((tmp_path / "t.npz").read_bytes())
    place = data.find(table.dense.tobytes()[:64])
    data[place + 5] ^= 1
    (tmp_path / "t.npz").write_bytes(bytes(data))
    with pytest.raises(CooccurrenceError, match="damaged|can be read"):
        PairTable.load(tmp_path / "t.npz")
