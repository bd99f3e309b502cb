"""The tokenizer: byte-level BPE or WordPiece, trained by ``tokenizers``; and what co-occurrence must know of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from actors.cooccurrence import Lexicon
from apps.program.errors import UserError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)


class TextTokenizer:
    """Ids of text; the special tokens are ids 0 to 4. Picklable."""

    def __init__(self, text: str):
        """``text``: the content of a ``tokenizer.json``.

        Raises:
            UserError: it is none, or its special tokens are not where this program has them.
        """
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare exceptions
            raise UserError(f"The tokenizer cannot be read: {error}.") from error
        wrong = [name for number, name in enumerate(SPECIAL) if self._tokenizer.token_to_id(name) != number]
        if wrong:
            raise UserError(
                f"The tokenizer must have {', '.join(SPECIAL)} as ids 0 to 4; {', '.join(wrong)} is not there."
            )
        self.text = text

    def __reduce__(self):
        return TextTokenizer, (self.text,)

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        try:
            return cls(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"There is no tokenizer {path} that can be read.") from error

    @property
    def size(self) -> int:
        return self._tokenizer.get_vocab_size()

    @cached_property
    def version(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        return [one.ids for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def token(self, number: int) -> str:
        return self._tokenizer.id_to_token(number) or ""

    def number(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    @cached_property
    def words(self) -> list[str]:
        """The token behind each id, as text without the tokenizer's marks."""
        return [self.token(i).replace("Ġ", " ").removeprefix("##") for i in range(self.size)]

    @cached_property
    def lexicon(self) -> Lexicon:
        """Which tokens are special, begin a word, end a sentence."""
        tokens = [self.token(i) for i in range(self.size)]
        if isinstance(self._tokenizer.model, models.WordPiece):
            begins = [not token.startswith("##") for token in tokens]
        else:
            begins = [token.startswith("Ġ") or not token[:1].isalnum() for token in tokens]
        ends = [token.strip("Ġ") in (".", "!", "?") for token in tokens]
        return Lexicon(self.size, tuple(range(len(SPECIAL))), np.array(begins), np.array(ends))


def train_tokenizer(texts: Iterable[str], kind: str, vocab_size: int) -> TextTokenizer:
    """Trains on ``texts``; the same texts give the same tokenizer.

    Raises:
        UserError: there is no text.
    """
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if vocab_size >= 512 else [],
        )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() <= len(SPECIAL):
        raise UserError("The corpus is empty: no document has data.min_words words.")
    return TextTokenizer(tokenizer.to_str())


__all__ = ["CLS", "MASK", "PAD", "SEP", "SPECIAL", "UNK", "TextTokenizer", "train_tokenizer"]
