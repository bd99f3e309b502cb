"""Preparation: text -> normalise -> tokenise -> packed rows -> shards, by Ray Data or in this process; done once for a source."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from platformdirs import user_cache_dir

from apps.mcmisp.data.config import DataConfig
from apps.mcmisp.data.pack import Packer
from apps.mcmisp.data.shards import FORMAT, TOKENIZER, Manifest, PackedRows, RowWriter, read_manifest, write_manifest
from apps.mcmisp.data.sources import Item, items_of, read_item, source_version
from apps.mcmisp.data.tokenizer import TextTokenizer, train_tokenizer
from apps.program.errors import UserError

logger = logging.getLogger(__name__)

Told = Callable[[str], None]
ITEMS_AT_ONCE = 64


def prepare(config: DataConfig, *, on_ray: bool = False, told: Told | None = None) -> PackedRows:
    """The prepared training rows of ``config`` (validation rows: ``PackedRows(folder, "validation")``), made now if need be.

    Raises:
        UserError: the corpus is empty, holds what is no text, or is too small to be split.
    """
    items = items_of(config)
    fingerprint = _fingerprint(config, items)
    root = Path(config.cache).expanduser() if config.cache else Path(user_cache_dir("sextant")) / "mcmisp"
    folder = root / fingerprint
    if (folder / "manifest.json").exists() and read_manifest(folder).fingerprint == fingerprint:
        return PackedRows(folder)
    unfinished = root / f".{fingerprint}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        _prepare(
            config, items, fingerprint, unfinished, _RayRunner() if on_ray else _LocalRunner(), told or logger.info
        )
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.replace(folder)
    except OSError as error:
        raise UserError(f"The corpus could not be prepared in {root}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return PackedRows(folder)


def _prepare(
    config: DataConfig, items: list[Item], fingerprint: str, folder: Path, runner: _Runner, told: Told
) -> None:
    if config.tokenizer_file:
        tokenizer = TextTokenizer.load(Path(config.tokenizer_file).expanduser())
    else:
        told(f"reading {len(items):,} files to train the tokenizer")
        texts = itertools.chain.from_iterable(runner.map(items, _Read(config)))
        tokenizer = train_tokenizer(_up_to(texts, config.train_chars), config.tokenizer, config.vocab_size)
    (folder / TOKENIZER).write_text(tokenizer.text)
    size = config.row_tokens
    writers = {part: RowWriter(folder, part, size, config.window_rows) for part in ("train", "validation")}
    packers = {part: Packer(size) for part in writers}
    shuffled = {part: _Shuffled(writers[part], config.shuffle_rows, config.seed + i) for i, part in enumerate(writers)}
    seen: set[bytes] = set()
    documents = duplicates = words = 0
    for number, batch in enumerate(runner.map(items, _Tokenise(config, tokenizer)), start=1):
        for digest, count, ids in batch:
            if config.max_documents is not None and documents >= config.max_documents:
                break
            if digest in seen:
                duplicates += 1
                continue
            seen.add(digest)
            documents, words = documents + 1, words + count
            part = (
                "validation" if int.from_bytes(digest[:4], "little") < config.validation_fraction * 2**32 else "train"
            )
            for row in packers[part].add(ids):
                shuffled[part].add(*row)
        if number % 20 == 0:
            told(f"{number * ITEMS_AT_ONCE:,} of {len(items):,} files, {documents:,} documents, {words:,} words")
    for part, packer in packers.items():
        for row in packer.finish():
            shuffled[part].add(*row)
        shuffled[part].close()
        if not writers[part].rows_by_file:
            raise UserError(
                "The corpus is empty: no document has data.min_words words." if not documents else
                f"All {documents} documents fell to one side of data.validation_fraction: the corpus is too small to be split."
            )  # fmt: skip
    manifest = Manifest(
        format=FORMAT, fingerprint=fingerprint, tokenizer=tokenizer.version, vocab_size=tokenizer.size, row_tokens=size,
        group_rows=config.window_rows, rows_by_file=writers["train"].rows_by_file,
        validation_rows=sum(writers["validation"].rows_by_file), documents=documents, duplicates=duplicates,
        tokens=sum(packer.tokens for packer in packers.values()),
        padding=sum(packer.padding for packer in packers.values()), words=words,
    )  # fmt: skip
    write_manifest(folder, manifest)
    told(f"{manifest.rows:,} rows of {size} tokens from {documents:,} documents ({duplicates:,} duplicates left out)")


class _Read:
    """Texts of some items."""

    def __init__(self, config: DataConfig):
        self.config = config

    def __call__(self, items: list[Item]) -> list[str]:
        return [text for item in items for text in read_item(item, self.config)]


class _Tokenise(_Read):
    """(digest of the text, words, ids) of each document of some items."""

    def __init__(self, config: DataConfig, tokenizer: TextTokenizer):
        super().__init__(config)
        self.tokenizer = tokenizer

    def __call__(self, items: list[Item]) -> list[tuple[bytes, int, list[int]]]:  # type: ignore[override]
        texts = super().__call__(items)
        digests = [hashlib.blake2b(text.encode(), digest_size=12).digest() for text in texts]
        return [
            (digest, len(text.split()), ids)
            for digest, text, ids in zip(digests, texts, self.tokenizer.encode(texts), strict=True)
        ]


class _Runner:
    """Applies a function to groups of items and gives the results in the items' order."""

    def map(self, items: list[Item], function: Callable) -> Iterator[list]:
        raise NotImplementedError


class _LocalRunner(_Runner):
    def map(self, items: list[Item], function: Callable) -> Iterator[list]:
        for start in range(0, len(items), ITEMS_AT_ONCE):
            yield function(items[start : start + ITEMS_AT_ONCE])


class _RayRunner(_Runner):
    """Ray Data tasks, one for each group; results travel as one pickled column, in order."""

    def map(self, items: list[Item], function: Callable) -> Iterator[list]:
        import pickle

        import ray.data

        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        groups = [items[start : start + ITEMS_AT_ONCE] for start in range(0, len(items), ITEMS_AT_ONCE)]

        def run(batch: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
            try:
                return {"result": [pickle.dumps(function(groups[int(i)])) for i in batch["id"]]}
            except UserError as error:
                return {"result": [pickle.dumps(error)]}

        dataset = ray.data.range(len(groups), override_num_blocks=len(groups)).map_batches(run, batch_size=1)
        for row in dataset.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, UserError):
                raise result
            yield result


class _Shuffled:
    """Passes rows on in a random order: a full buffer is shuffled and written."""

    def __init__(self, writer: RowWriter, size: int, seed: int):
        self._writer, self._size, self._rng = writer, size, np.random.default_rng(seed)
        self._buffer: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, ids: np.ndarray, document: np.ndarray) -> None:
        self._buffer.append((ids, document))
        if len(self._buffer) == self._size:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        for index in self._rng.permutation(len(self._buffer)):
            self._writer.add(*self._buffer[index])
        self._buffer = []


def _up_to(texts: Iterator[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def _fingerprint(config: DataConfig, items: list[Item]) -> str:
    settings = config.model_dump(mode="json", exclude={"cache"})
    facts = json.dumps([FORMAT, settings, source_version(config, items)], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


__all__ = ["prepare"]
