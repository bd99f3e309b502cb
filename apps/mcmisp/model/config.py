"""What an encoder is made of: the user's ``ModelConfig`` (a named size, a family) and the ``EncoderSpec`` that it resolves to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from apps.program.config import Config

Family = Literal["modern", "classic"]
Objective = Literal["mlm", "electra"]
Size = Literal["nano", "tiny", "small", "base"]

SIZES: dict[str, tuple[int, int, int]] = {
    "nano": (4, 128, 4),
    "tiny": (4, 256, 4),
    "small": (12, 384, 6),
    "base": (12, 768, 12),
}
"""Layers, width, heads. base is BERT-base's (Devlin et al. 2019), small GPT-BERT's."""


@dataclass(frozen=True)
class EncoderSpec:
    """One encoder, every choice made. ``embedding_width`` differs from ``width`` in ELECTRA's generator alone."""

    vocab_size: int
    layers: int
    width: int
    heads: int
    ffn: int
    max_positions: int
    pre_norm: bool
    rotary: bool
    gated: bool
    qk_norm: bool
    bias: bool
    norm_eps: float
    dropout: float
    embedding_width: int
    rotary_base: float = 10_000.0

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class ModelConfig(Config):
    """Section ``model``. ``layers``, ``width``, ``heads``, ``ffn`` override what ``size`` says."""

    size: Size = "nano"
    family: Family = "modern"
    """modern: pre-norm, RoPE, GeGLU, QK-norm, no biases. classic: BERT's post-norm, learned positions, GELU, biases."""
    objective: Objective = "mlm"
    layers: int | None = Field(default=None, ge=1, le=96)
    width: int | None = Field(default=None, ge=8)
    heads: int | None = Field(default=None, ge=1)
    ffn: int | None = Field(default=None, ge=8)
    """null: 4 x width; with gates 8/3 x width, which has the same number of weights."""
    max_positions: int = Field(default=512, ge=8, le=65_536)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    generator_ratio: float = Field(default=0.5, gt=0, le=1)
    """ELECTRA: width, heads and ffn of the generator over the discriminator's."""
    discriminator_weight: float = Field(default=50.0, gt=0)
    """ELECTRA: weight of the replaced-token loss beside the generator's (Clark et al. 2020, section 3)."""

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> ModelConfig:
        spec = self.spec(64)
        if spec.width % spec.heads:
            raise ValueError(f"a width of {spec.width} cannot be divided among {spec.heads} heads")
        if spec.head_dim % 2:
            raise ValueError(f"heads of {spec.head_dim} dimensions cannot be rotated: width / heads must be even")
        return self

    def spec(self, vocab_size: int) -> EncoderSpec:
        """The encoder that is trained (ELECTRA: the discriminator)."""
        layers, width, heads = SIZES[self.size]
        layers, width, heads = self.layers or layers, self.width or width, self.heads or heads
        return self._spec(vocab_size, layers, width, heads, self.ffn, width)

    def generator_spec(self, vocab_size: int) -> EncoderSpec:
        """ELECTRA's generator: as deep, narrower; its heads keep their width."""
        full = self.spec(vocab_size)
        heads = max(1, round(full.heads * self.generator_ratio))
        ffn = None if self.ffn is None else max(8, round(self.ffn * self.generator_ratio))
        return self._spec(vocab_size, full.layers, heads * full.head_dim, heads, ffn, full.width)

    def _spec(self, vocab: int, layers: int, width: int, heads: int, ffn: int | None, embedding: int) -> EncoderSpec:
        modern = self.family == "modern"
        usual = max(32, 32 * round(width * 8 / 3 / 32)) if modern else 4 * width
        return EncoderSpec(
            vocab_size=vocab, layers=layers, width=width, heads=heads, ffn=ffn or usual, max_positions=self.max_positions,
            pre_norm=modern, rotary=modern, gated=modern, qk_norm=modern, bias=not modern,
            norm_eps=1e-6 if modern else 1e-12, dropout=self.dropout, embedding_width=embedding,
        )  # fmt: skip


__all__ = ["SIZES", "EncoderSpec", "ModelConfig"]
