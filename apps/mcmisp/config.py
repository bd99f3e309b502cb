"""Configuration of the mcmisp app, and the arms that are compared: what each changes in it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from actors.cluster.session import RayConfig
from actors.cooccurrence.settings import CooccurrenceSettings
from apps.mcmisp.data.config import DataConfig
from apps.mcmisp.guidance.config import GuidanceConfig
from apps.mcmisp.model.config import ModelConfig
from apps.mcmisp.training.config import TrainingConfig
from apps.program.config import Config

Arm = Literal["plain", "guided", "random", "reversed", "adaptive", "guided_adaptive", "contrast"]
ARMS: tuple[Arm, ...] = ("plain", "guided", "random", "reversed", "adaptive", "guided_adaptive", "contrast")
"""random and reversed are controls: what helps them too is not the method's idea."""


class EvaluationConfig(Config):
    """Where evaluation data lies (an archive or a folder); null leaves that evaluation out."""

    blimp: str | None = None
    blimp_pairs: int | None = Field(default=None, ge=1)
    """Pairs of each task; null: all."""
    sst2: str | None = None
    rte: str | None = None
    epochs: int = Field(default=3, ge=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    batch: int = Field(default=32, ge=1)
    examples: int | None = Field(default=None, ge=1)
    """Training examples at most."""


class CompareConfig(Config):
    arms: list[Arm] = Field(default_factory=lambda: list(ARMS))
    seeds: list[int] = Field(default_factory=lambda: list(range(5)))
    trials_at_once: int = Field(default=2, ge=1)
    bootstrap: int = Field(default=10_000, ge=100)
    target_quantile: float = Field(default=1.0, gt=0, le=1)
    """The loss to be reached: what the plain arm has after this share of its steps."""


class McmispConfig(Config):
    """``python -m apps.mcmisp VERB [--config configs/mcmisp/<preset>.yaml] [key=value ...]``."""

    arm: Arm = "guided"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    cooccurrence: CooccurrenceSettings = CooccurrenceSettings()
    guidance: GuidanceConfig = GuidanceConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    compare: CompareConfig = CompareConfig()
    ray: RayConfig = RayConfig()

    @property
    def is_guided(self) -> bool:
        return self.arm not in ("plain", "adaptive")

    def for_arm(self, arm: Arm, seed: int | None = None) -> McmispConfig:
        """The configuration with what the arm changes."""
        target = {
            "guided": "rare",
            "guided_adaptive": "rare",
            "random": "random",
            "reversed": "reversed",
            "contrast": "contrast",
        }
        masking = "adaptive" if arm in ("adaptive", "guided_adaptive") else "uniform"
        training = {"masking": masking} | ({} if seed is None else {"seed": seed})
        changes = {"arm": arm, "training": self.training.model_copy(update=training)}
        if arm in target:
            changes["guidance"] = self.guidance.model_copy(update={"target": target[arm]})
        return self.model_copy(update=changes)


__all__ = ["ARMS", "Arm", "CompareConfig", "EvaluationConfig", "McmispConfig"]
