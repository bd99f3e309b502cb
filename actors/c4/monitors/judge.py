"""The diagnosis as the master asks it (``master_core.Judge``): fixed settings, and which named faults still stand. No Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.c4.diagnosis.diagnose import diagnose
from actors.c4.diagnosis.memory import DiagnosisMemory
from actors.c4.diagnosis.observation import Observation
from actors.c4.diagnosis.settings import DiagnosisSettings
from actors.c4.diagnosis.verdict import Verdict
from actors.c4.monitors.master_core import Key


class DiagnosisJudge:
    """``diagnose`` under fixed settings."""

    def __init__(self, settings: DiagnosisSettings | None = None):
        self.settings = settings or DiagnosisSettings()

    def look(self, observation: Observation, memory: Any) -> tuple[tuple[Verdict, ...], Any]:
        """See ``Judge``."""
        return diagnose(observation, memory or DiagnosisMemory(), self.settings)

    def standing(self, memory: Any) -> Mapping[Key, float]:
        """See ``Judge``. The keys are those of the diagnosis: (kind, ranks, link)."""
        return {key: one.last_s for key, one in memory.standing.items() if one.named}
