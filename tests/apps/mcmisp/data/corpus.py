"""A small corpus of sentences with structure, prepared where a test says."""

from __future__ import annotations

import random
from pathlib import Path

from apps.mcmisp.data.config import DataConfig

ANIMALS, FOODS = ["cat", "dog", "owl", "fox"], ["milk", "bone", "mice", "eggs"]


def write_corpus(folder: Path, documents: int = 300, seed: int = 0) -> None:
    """Each animal has its food, so that a model can learn which word is behind a mask."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(documents):
        sentences = []
        for _ in range(rng.randint(2, 5)):
            which = rng.randrange(4)
            sentences.append(
                f"The {ANIMALS[which]} that we saw on day {rng.randrange(40)} likes {FOODS[which]} very much."
            )
        lines.append(f"Story {number}. " + " ".join(sentences))
    (folder / "corpus.txt").write_text("\n".join(lines))


def data_config(folder: Path, **options) -> DataConfig:
    return DataConfig(
        **{
            "source": "folder", "folder": str(folder / "text"), "document": "line", "vocab_size": 300, "row_tokens": 32,
            "window_rows": 64, "shuffle_rows": 100, "validation_fraction": 0.1, "cache": str(folder / "cache"), **options,
        }
    )  # fmt: skip
