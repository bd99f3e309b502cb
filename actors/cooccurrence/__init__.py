"""The co-occurrence service: which words go together, counted exactly by any number of workers, published as a quantised table.

``count`` (pairs of a batch), ``shard`` (a part of the counts, journalled), ``table`` (scores in int8) are plain modules;
``service`` puts shards into Ray actors, ``prepass`` counts a data set with Ray Data.
"""

from actors.cooccurrence.count import PairCounts, count_pairs, merge
from actors.cooccurrence.errors import CooccurrenceError
from actors.cooccurrence.settings import CooccurrenceSettings, Lexicon
from actors.cooccurrence.table import PairTable, build_table

__all__ = [
    "CooccurrenceError", "CooccurrenceSettings", "Lexicon", "PairCounts", "PairTable", "build_table", "count_pairs", "merge",
]  # fmt: skip
