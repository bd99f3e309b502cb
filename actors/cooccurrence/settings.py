"""What is counted and how it becomes a score: every open choice of the method's record, by name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Literal

import numpy as np

from actors.cooccurrence.errors import CooccurrenceError

Normalisation = Literal["raw", "log", "conditional", "pmi", "ppmi"]
NORMALISATIONS: tuple[str, ...] = ("raw", "log", "conditional", "pmi", "ppmi")


@dataclass(frozen=True)
class CooccurrenceSettings:
    """Section ``cooccurrence`` of a configuration; checked when made."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    window: int = 8
    """Two words go together when they are at most so many units apart, in one document; 0: anywhere in one span."""
    span: Literal["document", "sentence"] = "document"
    """What a pair never reaches beyond."""
    unit: Literal["subword", "word"] = "subword"
    """word: distance is counted in words, and the pieces of one word are no pair."""
    normalisation: Normalisation = "pmi"
    """raw C, log(1 + C), conditional P(key | predicted), pmi log(C N / n n), ppmi max(0, pmi)."""
    alpha: float = 0.1
    """Added to C in pmi and ppmi, so that a pair never seen has a finite score."""
    min_count: int = 1
    """A pair seen less often counts as never seen."""
    layout: Literal["auto", "dense", "csr"] = "auto"
    dense_limit: int = 16_384
    """``auto``: dense up to this vocabulary (1 byte a pair). Dense beyond it is refused."""
    decay: float = 1.0
    """Online: counts are multiplied by it with every snapshot, rounded down."""

    def __post_init__(self) -> None:
        problems = [
            (0 <= self.window <= 1024, f"window must be 0 to 1024 units, not {self.window}"),
            (self.alpha > 0, f"alpha must be above 0, not {self.alpha}"),
            (self.min_count >= 1, f"min_count must be at least 1, not {self.min_count}"),
            (0 < self.decay <= 1, f"decay must be above 0 and at most 1, not {self.decay}"),
            (self.normalisation in NORMALISATIONS, f"normalisation must be one of {', '.join(NORMALISATIONS)}"),
            (self.dense_limit >= 1, f"dense_limit must be at least 1, not {self.dense_limit}"),
        ]
        for fine, sentence in problems:
            if not fine:
                raise ValueError(sentence)

    def layout_for(self, vocab_size: int) -> Literal["dense", "csr"]:
        """The layout that ``auto`` means.

        Raises:
            CooccurrenceError: dense was asked for and the vocabulary is larger than ``dense_limit``.
        """
        if self.layout == "dense" and vocab_size > self.dense_limit:
            raise CooccurrenceError(
                f"A dense table of {vocab_size} x {vocab_size} pairs is beyond cooccurrence.dense_limit {self.dense_limit}: "
                "use layout=csr, a smaller vocabulary, or raise the limit."
            )
        if self.layout == "auto":
            return "dense" if vocab_size <= self.dense_limit else "csr"
        return self.layout


@dataclass(frozen=True)
class Lexicon:
    """What counting must know of a vocabulary. ``special``: ids that are no words. Flags [V] say which tokens begin a word and

    end a sentence; they are needed for ``unit: word`` and ``span: sentence``.
    """

    size: int
    special: tuple[int, ...] = ()
    begins_word: np.ndarray | None = field(default=None, repr=False)
    ends_sentence: np.ndarray | None = field(default=None, repr=False)

    def check(self, settings: CooccurrenceSettings) -> None:
        """
        Raises:
            CooccurrenceError: the settings need a flag that is not there.
        """
        needed = {"begins_word": settings.unit == "word", "ends_sentence": settings.span == "sentence"}
        for name, wanted in needed.items():
            flags = getattr(self, name)
            if wanted and flags is None:
                raise CooccurrenceError(
                    f"This tokenizer does not say which tokens are meant by {name}: it cannot be counted so."
                )
            if flags is not None and len(flags) != self.size:
                raise CooccurrenceError(f"{name} has {len(flags)} flags for a vocabulary of {self.size}.")


def fingerprint(settings: CooccurrenceSettings, lexicon: Lexicon) -> str:
    """Names what is counted: equal for equal settings and vocabulary."""
    digest = hashlib.sha256(json.dumps([asdict(settings), lexicon.size, lexicon.special], sort_keys=True).encode())
    for flags in (lexicon.begins_word, lexicon.ends_sentence):
        digest.update(b"-" if flags is None else np.packbits(np.asarray(flags, dtype=bool)).tobytes())
    return digest.hexdigest()[:16]
