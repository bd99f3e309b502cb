"""Section ``guidance``: every choice that the abstract leaves open, by name. Defaults are a reconstruction, not the paper's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from apps.program.config import Config


class GuidanceConfig(Config):
    """L = L_mlm + weight(t) * mean over errors of the mean over guided heads of D(target || attention)."""

    target: Literal["rare", "random", "reversed", "contrast"] = "rare"
    """rare: weight to words that rarely go with the wrong word. Controls: random (another word, by frequency),

    reversed (weight to words that often go with it). contrast: rare with the wrong word and often with the right one.
    """
    shape: Literal["softmax", "linear", "median"] = "softmax"
    """softmax(-score / temperature); linear in the score between the extremes of a row; even over the half of lower scores."""
    temperature: float = Field(default=2.0, gt=0)
    divergence: Literal["kl", "mse", "bce"] = "kl"
    """kl(target || attention); squared error summed over keys; binary cross-entropy averaged over keys."""
    renormalise: bool = True
    """Attention is compared after it is renormalised over the keys that the target speaks of."""
    mask_keys: Literal["out", "in"] = "out"
    """Whether masked positions are keys of the target."""
    gate: Literal["all", "confident"] = "confident"
    """confident: only errors whose wrong word has a probability above ``gate_factor`` times its frequency."""
    gate_factor: float = Field(default=2.0, ge=0)
    heads: int | None = Field(default=None, ge=1)
    """Guided heads of each guided layer, the first ones; null: a quarter of them."""
    layers: Literal["all", "lower", "middle", "upper"] | list[int] = "all"
    """Halves of the encoder (middle: without the first and last quarter), or layer numbers from 0."""
    weight: float = Field(default=1.0, ge=0)
    schedule: Literal["constant", "warmup_decay"] = "warmup_decay"
    start_error_rate: float = Field(default=0.9, gt=0, le=1)
    """Guidance begins when the running error rate falls below it: before, the wrong word is nearly always a frequent one."""
    warmup_steps: int = Field(default=50, ge=0)
    electra: Literal["discriminator", "generator", "both"] = "discriminator"
    undetected_only: bool = False
    """ELECTRA's discriminator: only replaced tokens that it takes for original ones."""
    backend: Literal["auto", "maps", "rows", "fused"] = "auto"
    """auto: the fused kernel on a GPU where it applies, else rows; on a CPU maps up to ``maps_up_to`` tokens, else rows."""
    maps_up_to: int = Field(default=128, ge=0)


__all__ = ["GuidanceConfig"]
