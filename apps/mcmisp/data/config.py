"""Section ``data``: where text comes from, how it is tokenised and packed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from apps.program.config import Config

PACKAGES = (
    "numpy", "scipy", "torch", "ray", "pandas", "matplotlib", "networkx", "sklearn", "deepspeed", "pyarrow", "PIL", "jinja2",
    "pydantic", "fastapi", "starlette", "httpx", "psutil", "rich", "typer", "omegaconf", "tokenizers", "huggingface_hub",
)  # fmt: skip
"""The embedded default: real technical English that an installation has. What is not installed is left out."""


class DataConfig(Config):
    """The same values and the same sources give the same rows, bit for bit."""

    source: Literal["docstrings", "folder", "huggingface"] = "docstrings"
    packages: list[str] = Field(default_factory=lambda: list(PACKAGES))
    """docstrings: import names of installed packages; their files are read, nothing is imported."""
    standard_library: bool = True
    """docstrings: also those of Python's own modules."""
    folder: str | None = None
    """folder: read with all below it: .txt, .md, .rst, .text, and such files in .tar archives (.gz, .xz, .bz2)."""
    document: Literal["file", "paragraph", "line"] = "file"
    """folder: what one document is."""
    dataset: str | None = None
    """huggingface: name of a data set, streamed (needs the package ``datasets``)."""
    dataset_config: str | None = None
    dataset_split: str = "train"
    dataset_column: str = "text"
    max_documents: int | None = Field(default=None, ge=1)
    min_words: int = Field(default=8, ge=1)
    """Documents with fewer are left out."""
    max_line_chars: int = Field(default=1_000_000, ge=80)
    """A longer line is no text and is refused."""
    lowercase: bool = False
    tokenizer: Literal["bpe", "wordpiece"] = "bpe"
    tokenizer_file: str | None = None
    """A ``tokenizer.json`` to use instead of training one."""
    vocab_size: int = Field(default=8192, ge=64, le=262_144)
    train_chars: int = Field(default=30_000_000, ge=1)
    """Characters that the tokenizer is trained on."""
    row_tokens: int = Field(default=128, ge=8, le=65_536)
    validation_fraction: float = Field(default=0.02, gt=0, lt=0.5)
    """Of documents, chosen by their text."""
    shuffle_rows: int = Field(default=65_536, ge=1)
    """Rows that are shuffled together when they are written."""
    window_rows: int = Field(default=8192, ge=1)
    """Rows that are shuffled together anew in each epoch; also the size of what is read at once."""
    seed: int = 0
    cache: str | None = None
    """Folder for prepared rows; null: the user's cache folder."""

    @model_validator(mode="after")
    def _source_is_named(self) -> DataConfig:
        needed = {"folder": "folder", "huggingface": "dataset"}.get(self.source)
        if needed is not None and not getattr(self, needed):
            raise ValueError(f"source={self.source} needs data.{needed}")
        if self.source == "huggingface" and self.max_documents is None:
            raise ValueError("source=huggingface needs data.max_documents: a streamed data set may have no end")
        return self


__all__ = ["PACKAGES", "DataConfig"]
