"""What a Llama-family decoder looks like: its dimensions, its rotary embedding, and which optional parts it has.

The loaders (weights/) fill it from a file's metadata; the decoders (model_*.py) read nothing else about the architecture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch


class ModelLoadError(RuntimeError):
    """A model cannot be loaded; the message is one line that names the file and what is wrong with it."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))  # Parts of it may come from a damaged file.


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base, scaling, and the layout of the pairs that are rotated together."""

    theta: float = 10_000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    """llama3 only, as the three below."""
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    freq_factors: tuple[float, ...] | None = None
    """Divisors of the frequencies given one by one (GGUF's ``rope_freqs.weight``); used instead of ``scaling``."""
    interleaved: bool = False
    """True: dimensions (2i, 2i+1) form a pair, as GGUF stores Llama's Q and K; False: (i, i + head_dim/2), as Hugging Face."""

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """fp32 [head_dim/2]: radians per position of each pair.

        Source: Su et al. 2021 (RoFormer), eq. 15; llama3: the smooth interpolation published with Llama 3.1. The operations
        are in fp32 and in the order of transformers' ``modeling_rope_utils``, so that both give the same angles.
        """
        inv_freq = 1.0 / (self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        if self.freq_factors is not None:
            return inv_freq / torch.tensor(self.freq_factors, dtype=torch.float32)
        if self.scaling == "linear":
            return inv_freq / self.factor
        if self.scaling == "llama3":
            wavelength = 2 * math.pi / inv_freq
            original = self.original_max_position_embeddings
            smooth = (original / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            scaled = torch.where(wavelength > original / self.low_freq_factor, inv_freq / self.factor, inv_freq)
            between = (wavelength >= original / self.high_freq_factor) & (wavelength <= original / self.low_freq_factor)
            return torch.where(between, (1 - smooth) * scaled / self.factor + smooth * scaled, scaled)
        return inv_freq

    def cos_sin_table(self, head_dim: int, length: int) -> torch.Tensor:
        """fp32 [length, head_dim]: cosines of positions 0 ... length-1 in the first half of a row, sines in the second.

        The angle is rounded to fp32 as transformers does; its cosine is taken in fp64, which no CPU's vector library bends.
        """
        angle = torch.arange(length, dtype=torch.float32)[:, None] * self.inverse_frequencies(head_dim)[None, :]
        return torch.cat((angle.double().cos(), angle.double().sin()), dim=1).float().contiguous()


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and parts of one decoder. ``validate`` before use."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head's query and key before RoPE (Qwen3)."""
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def q_size(self) -> int:
        """Columns of the query projection: num_heads * head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the key projection: num_kv_heads * head_dim."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights of all matrices and norms; a tied head counts once."""
        attention = self.hidden_size * (2 * self.q_size + 2 * self.kv_size)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        heads = 1 if self.tie_word_embeddings else 2
        return self.num_layers * layer + heads * self.vocab_size * self.hidden_size + self.hidden_size

    def validate(self, where: str) -> ModelConfig:
        """Return self; ModelLoadError naming ``where`` if the dimensions cannot belong to a decoder."""
        limits = {
            "hidden_size": 1 << 20,
            "intermediate_size": 1 << 22,
            "num_layers": 4096,
            "num_heads": 4096,
            "num_kv_heads": 4096,
            "head_dim": 4096,
            "vocab_size": 1 << 24,
            "max_position_embeddings": 1 << 28,
        }
        for name, largest in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= largest:
                raise ModelLoadError(f"{where} says {name} = {value!r}; it must be a whole number from 1 to {largest}")
        if self.num_heads % self.num_kv_heads:
            raise ModelLoadError(
                f"{where}: {self.num_heads} query heads do not share {self.num_kv_heads} KV heads evenly"
            )
        if self.head_dim % 2:
            raise ModelLoadError(f"{where}: head_dim {self.head_dim} is odd, and RoPE rotates pairs")
        if not (math.isfinite(self.rms_norm_eps) and 0 <= self.rms_norm_eps < 1):
            raise ModelLoadError(f"{where} says rms_norm_eps = {self.rms_norm_eps!r}; it must be from 0 to 1")
        rope = self.rope
        if not (math.isfinite(rope.theta) and rope.theta > 0 and math.isfinite(rope.factor) and rope.factor > 0):
            raise ModelLoadError(f"{where}: the RoPE base {rope.theta!r} and factor {rope.factor!r} must be positive")
        if rope.scaling == "llama3" and not 0 < rope.low_freq_factor < rope.high_freq_factor:
            raise ModelLoadError(f"{where}: llama3 RoPE scaling needs 0 < low_freq_factor < high_freq_factor")
        if rope.freq_factors is not None and len(rope.freq_factors) != self.head_dim // 2:
            raise ModelLoadError(f"{where}: {len(rope.freq_factors)} RoPE factors for {self.head_dim // 2} frequencies")
        return self
