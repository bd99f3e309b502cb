"""Preparation and feeding: nothing of a document is lost or padded, rows are found again, and every step has its exact rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apps.mcmisp.data.feed import local_feed, ray_dataset, streaming_feed
from apps.mcmisp.data.order import RowOrder
from apps.mcmisp.data.pack import Packer
from apps.mcmisp.data.prepare import prepare
from apps.mcmisp.data.shards import PackedRows
from apps.mcmisp.data.tokenizer import CLS, PAD, SEP, TextTokenizer, train_tokenizer
from apps.program.errors import UserError
from tests.apps.mcmisp.data.corpus import data_config, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus")
    write_corpus(path / "text")
    return path


@pytest.fixture(scope="module")
def rows(folder) -> PackedRows:
    return prepare(data_config(folder))


# ---- packing


def test_packed_rows_hold_every_token_in_order_and_only_the_last_is_padded():
    rng = np.random.default_rng(0)
    documents = [rng.integers(5, 99, rng.integers(1, 40)).tolist() for _ in range(50)]
    packer = Packer(16)
    rows = [row for document in documents for row in packer.add(document)] + list(packer.finish())
    flat = np.concatenate([ids for ids, _ in rows])
    expected = [t for document in documents for t in (CLS, *document, SEP)]
    assert flat[: len(expected)].tolist() == expected
    assert (flat[len(expected) :] == PAD).all() and packer.padding == len(flat) - len(expected) < 16
    for ids, document in rows:
        assert ((document == 0) == (ids == PAD)).all()
        new = np.flatnonzero(ids == CLS)
        assert all(i == 0 or document[i] == document[i - 1] + 1 for i in new)
        same = np.flatnonzero(document[1:] == document[:-1])
        assert not np.isin(same + 1, new).any()


# ---- tokenizer


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_tokenizer_encodes_and_knows_words_and_sentences(kind):
    texts = ["The cat likes milk. The dogs like bones!"] * 50
    one = train_tokenizer(texts, kind, 400)
    again = TextTokenizer(one.text)
    ids = one.encode(["The cat likes bones."])[0]
    assert again.encode(["The cat likes bones."])[0] == ids and again.version == one.version
    assert one.decode(ids).strip() == "The cat likes bones."
    lexicon = one.lexicon
    assert lexicon.special == (0, 1, 2, 3, 4) and lexicon.size == one.size
    assert lexicon.begins_word[ids].sum() == 5  # The cat likes bones .
    assert lexicon.ends_sentence[ids].tolist() == [False] * (len(ids) - 1) + [True]


def test_a_foreign_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        TextTokenizer("hello")
    with pytest.raises(UserError, match="There is no tokenizer"):
        TextTokenizer.load(tmp_path / "none.json")


# ---- preparation


def test_a_corpus_is_prepared_once_with_hardly_any_padding(rows, folder):
    manifest = rows.manifest
    assert manifest.padding_fraction < 0.01
    assert manifest.documents == 300 and manifest.duplicates == 0
    assert manifest.validation_rows > 0 and len(rows) == manifest.rows > 200
    ids, document = rows.read(0, len(rows))
    assert ids.shape == (len(rows), 32) and ids.max() < manifest.vocab_size
    before = (rows.folder / "manifest.json").stat().st_mtime_ns
    assert prepare(data_config(folder)).folder == rows.folder
    assert (rows.folder / "manifest.json").stat().st_mtime_ns == before
    assert prepare(data_config(folder, row_tokens=64)).folder != rows.folder


def test_rows_are_read_by_number_across_groups_and_files(rows):
    ids, document = rows.read(0, len(rows))
    for start, stop in ((0, 5), (60, 70), (63, 64), (100, len(rows))):
        got = rows.read(start, stop)
        assert np.array_equal(got[0], ids[start:stop]) and np.array_equal(got[1], document[start:stop])


def test_a_changed_file_is_prepared_anew(tmp_path):
    write_corpus(tmp_path / "text", documents=60)
    first = prepare(data_config(tmp_path))
    write_corpus(tmp_path / "text", documents=70)
    assert prepare(data_config(tmp_path)).folder != first.folder


def test_duplicates_are_left_out_and_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "text").mkdir()
    line = "one and the same line of some ten words again {}"
    (tmp_path / "text" / "a.txt").write_text("\n".join(line.format(i % 40) for i in range(90)))
    manifest = prepare(data_config(tmp_path)).manifest
    assert (manifest.documents, manifest.duplicates) == (40, 50)
    (tmp_path / "text" / "a.txt").write_text("too short\n")
    with pytest.raises(UserError, match="The corpus is empty"):
        prepare(data_config(tmp_path))
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.cluster
def test_ray_data_prepares_the_same_rows_and_streams_them_in_order(ray_local, rows, folder, tmp_path):
    on_ray = prepare(data_config(folder, cache=str(tmp_path)), on_ray=True)
    assert np.array_equal(on_ray.read(0, len(rows))[0], rows.read(0, len(rows))[0])
    order = RowOrder(len(rows), 8, 64, seed=3)
    import ray.data

    ray.data.DataContext.get_current().execution_options.preserve_order = True
    dataset = ray_dataset(rows)
    for first in (0, 17):  # from the beginning, and resumed
        for rank in range(2):
            stream, local = streaming_feed(dataset, order, 32, rank, 2), local_feed(rows, order, rank, 2)
            for step in (*range(first, first + 10), order.steps_per_epoch + 1):
                a, b = stream.batch(step), local.batch(step)
                assert torch.equal(a.row_B, b.row_B) and torch.equal(a.ids_BS, b.ids_BS)


# ---- order


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_epoch_visits_every_row_once_whoever_reads(world_size):
    order = RowOrder(rows=100, batch=8, window=24, seed=1)
    seen = torch.cat(
        [order.batch_rows(s, r, world_size) for s in range(order.steps_per_epoch) for r in range(world_size)]
    )
    assert len(seen) == 96 and len(set(seen.tolist())) == 96
    step = 7
    parts = torch.cat([order.batch_rows(step, r, world_size) for r in range(world_size)])
    assert torch.equal(parts, order.batch_rows(step))
    assert not torch.equal(order.batch_rows(0), order.batch_rows(order.steps_per_epoch))
    with pytest.raises(ValueError, match="larger than the data|cannot be drawn"):
        RowOrder(rows=7, batch=8, window=4, seed=0)


def test_the_feed_gives_the_orders_rows_from_any_step_on(rows):
    order = RowOrder(len(rows), 16, 64, seed=0)
    ids, document = rows.read(0, len(rows))
    for first in (0, 9, order.steps_per_epoch - 1):
        feed = local_feed(rows, order, rank=1, world_size=2)
        for step in range(first, first + 3):
            batch = feed.batch(step)
            expected = order.batch_rows(step, 1, 2)
            assert torch.equal(batch.row_B, expected)
            assert np.array_equal(batch.ids_BS.numpy(), ids[expected]) and np.array_equal(
                batch.document_BS.numpy(), document[expected]
            )
