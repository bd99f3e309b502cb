"""Prompts of a wanted length in tokens for the load generator: real text through a tokenizer, or seeded token ids without one.

A prompt is a function of (seed, index, length) alone, so that a replay can be repeated; prompts of different indices differ
within their first block, so that the prefix cache does not serve one from another's blocks.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

_SENTENCES = (
    "The harbour was quiet before sunrise, and the first boats had not yet come back from the sea.",
    "A paged cache keeps the keys and values of every token in blocks of equal size.",
    "She counted the steps to the lighthouse twice and arrived at two different numbers.",
    "When the queue grows faster than it drains, every request behind its head waits for the longest one.",
    "Bread needs four things: flour, water, salt and more patience than most recipes admit.",
    "The committee met on Tuesday, agreed on nothing, and decided to meet again on Thursday.",
    "Glaciers move slowly, but they move mountains with them when they have enough time.",
    "An instrument that is never calibrated measures mostly the hopes of its owner.",
    "In the old library the maps were kept upstairs, because the cellar had flooded more than once.",
    "Migrating birds follow the coast by day and the stars by night, as far as anybody knows.",
    "The engineer wrote down the temperature every hour, and the curve told her what had failed.",
    "Nobody in the village remembered who had planted the walnut tree in front of the school.",
    "A short message that arrives late is worth less than a long one that arrives in time.",
    "The train crossed the bridge at noon, eleven minutes after the timetable had promised it.",
    "He repaired clocks for a living and was, for that reason, never in a hurry.",
    "Two rivers meet below the town, one of them clear and cold, the other brown with clay.",
    "To compare two machines fairly, one has to give both of them the same work in the same order.",
    "The recipe asked for three eggs, but there were only two, so the cake stayed flat.",
    "Rain fell on the tin roof all afternoon, and the children invented a game without rules.",
    "Every proof begins with something that everybody in the room is willing to believe.",
    "The telescope showed a faint ring around the planet, thinner than any drawing had suggested.",
    "Old letters were found behind the wall, tied with a blue ribbon and addressed to no one.",
    "A good map leaves out nearly everything and is useful because of what it leaves out.",
    "Merchants weighed the pepper with small brass weights that nobody outside the market trusted.",
)


class Encoder(Protocol):
    """What is asked of a tokenizer here."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


class Prompts(Protocol):
    """Prompt ``index`` of a replay as ``length`` token ids."""

    description: str

    def make(self, index: int, length: int) -> list[int]: ...


class TextPrompts:
    """Sentences in seeded order, tokenized and cut to length."""

    def __init__(self, tokenizer: Encoder, seed: int = 0):
        self.description = "sentences in seeded order"
        self._tokenizer, self._seed = tokenizer, seed
        self._sentences = [tokenizer.encode(" " + sentence, add_special_tokens=False) for sentence in _SENTENCES]

    def make(self, index: int, length: int) -> list[int]:
        """``length`` token ids; a note with the number comes first."""
        rng = np.random.Generator(np.random.Philox(key=[self._seed, index]))
        ids = list(self._tokenizer.encode(f"Note {index} of series {self._seed}.", add_special_tokens=False))
        while len(ids) < length:
            for choice in rng.permutation(len(self._sentences)):
                ids += self._sentences[choice]
        return ids[:length]


class TokenPrompts:
    """Seeded token ids between ``low`` and ``high``: lengths as wanted on any model, without its tokenizer.

    The default range holds ordinary pieces of words in the vocabularies of the supported models.
    """

    def __init__(self, seed: int = 0, low: int = 1000, high: int = 30_000):
        self.description = "seeded token ids"
        self._seed, self._low, self._high = seed, low, high

    def make(self, index: int, length: int) -> list[int]:
        """``length`` token ids."""
        rng = np.random.Generator(np.random.Philox(key=[self._seed, index]))
        return rng.integers(self._low, self._high, size=length).tolist()
