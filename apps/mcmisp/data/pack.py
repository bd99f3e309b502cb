"""Packing: documents laid end to end into rows of one length, so that only the very last row is padded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from apps.mcmisp.data.tokenizer import CLS, PAD, SEP


class Packer:
    """Rows of ``size`` tokens: [CLS] document [SEP] [CLS] document ... A document that does not fit goes on in the next row.

    ``document`` numbers the documents of a row from 1; padding is 0. Attention stays within a number.
    """

    def __init__(self, size: int):
        self._size = size
        self._begin()
        self.tokens = self.padding = 0

    def add(self, ids: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows that became full."""
        text = np.array([CLS, *ids, SEP], dtype=np.int32)
        self.tokens += len(text)
        while len(text):
            self._number += 1
            count = min(len(text), self._size - self._filled)
            place = slice(self._filled, self._filled + count)
            self._ids[place], self._document[place] = text[:count], self._number
            self._filled += count
            text = text[count:]
            if self._filled == self._size:
                yield self._ids, self._document
                self._begin()

    def finish(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The last row, padded."""
        if self._filled:
            self.padding += self._size - self._filled
            yield self._ids, self._document
            self._begin()

    def _begin(self) -> None:
        self._ids = np.full(self._size, PAD, dtype=np.int32)
        self._document = np.zeros(self._size, dtype=np.uint16)
        self._filled = self._number = 0


__all__ = ["Packer"]
