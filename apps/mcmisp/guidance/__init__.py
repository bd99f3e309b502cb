"""Guidance: where a mis-predicted position should have looked, and how far the guided heads looked elsewhere. Pure torch."""

from apps.mcmisp.guidance.config import GuidanceConfig
from apps.mcmisp.guidance.guide import Errors, Guide, GuideResult
from apps.mcmisp.guidance.schedule import WeightSchedule

__all__ = ["Errors", "GuidanceConfig", "Guide", "GuideResult", "WeightSchedule"]
