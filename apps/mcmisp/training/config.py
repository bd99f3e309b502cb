"""Section ``training``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from apps.program.config import Config


class TrainingConfig(Config):
    steps: int = Field(default=800, ge=1)
    batch: int = Field(default=32, ge=1)
    """Rows of a step, of all workers together."""
    workers: int = Field(default=0, ge=0)
    """Workers of Ray Train under C4; 0: this process, without Ray."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: for the matrices inside of layers (Jordan 2024), AdamW for the rest."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak. Muon's updates are scaled to the size of AdamW's, so that one rate serves both."""
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    decay_fraction: float = Field(default=0.3, ge=0, le=1)
    """Warm-up, stable, linear decay to zero in the last part of the steps (WSD)."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    masking: Literal["uniform", "adaptive"] = "uniform"
    mask_rate_first: float = Field(default=0.30, gt=0, lt=1)
    mask_rate_last: float = Field(default=0.15, gt=0, lt=1)
    z_loss: float = Field(default=1e-4, ge=0)
    """Weight of the squared log of the softmax's denominator (Chowdhery et al. 2022, PaLM)."""
    ema: float | None = Field(default=0.995, gt=0, lt=1)
    """Decay of the running mean of the weights, which is what is evaluated and saved; null: none."""
    precision: Literal["bf16", "fp32"] = "bf16"
    threads: int | None = Field(default=1, ge=1)
    """Of torch in each worker; null leaves torch's own choice."""
    seed: int = 0
    report_every: int = Field(default=20, ge=1)
    evaluate_every: int | None = Field(default=100, ge=1)
    evaluation_rows: int = Field(default=256, ge=1)
    checkpoint_every: int | None = Field(default=200, ge=1)


__all__ = ["TrainingConfig"]
