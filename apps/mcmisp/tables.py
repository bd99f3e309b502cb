"""The co-occurrence table that belongs to a prepared corpus: kept beside it, counted now if need be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from actors.cooccurrence import CooccurrenceError, CooccurrenceSettings, PairTable, build_table
from actors.cooccurrence.prepass import count_rows
from actors.cooccurrence.service import LocalStore, ShardedStore
from actors.cooccurrence.settings import fingerprint
from apps.mcmisp.data.shards import PackedRows
from apps.program.errors import UserError


def table_path(rows: PackedRows, settings: CooccurrenceSettings) -> Path:
    """Where the table of these settings lies."""
    return rows.folder / f"cooccurrence-{fingerprint(settings, rows.tokenizer().lexicon)}.npz"


def table_of(
    rows: PackedRows,
    settings: CooccurrenceSettings,
    *,
    workers: int = 0,
    shards: int = 2,
    told: Callable[[int, int], None] | None = None,
) -> PairTable:
    """The table of the training rows; ``workers`` 0 counts here, else so many Ray Data tasks at a time.

    Raises:
        UserError: nothing to count, or the vocabulary is larger than the table allows.
    """
    lexicon = rows.tokenizer().lexicon
    path = table_path(rows, settings)
    try:
        if path.exists():
            table = PairTable.load(path)
            table.require(lexicon, settings)
            return table
        settings.layout_for(lexicon.size)
        if not workers:
            counts = count_rows(rows, lexicon, settings, LocalStore(lexicon.size), told=told)
        else:
            store = ShardedStore.start(lexicon.size, shards)
            try:
                counts = count_rows(rows, lexicon, settings, store, workers=workers, told=told)
            finally:
                store.close()
        table = build_table(counts, lexicon, settings)
        table.save(path)
        return table
    except CooccurrenceError as error:
        raise UserError(str(error)) from error


__all__ = ["table_of", "table_path"]
