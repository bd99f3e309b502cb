"""Settings of the monitors: how often rings are read, reported and judged, and what a silence means. Imports no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.c4.diagnosis.settings import DiagnosisSettings


@dataclass(frozen=True)
class MonitorSettings:
    """Of a run's master and agents; the defaults keep hang to named culprit under two seconds at about 0.5 kB/s a rank."""

    poll_s: float = 0.1
    """An agent reads its rings this often."""
    report_s: float = 0.3
    """It reports this often while everything moves, and at every poll while something stands still."""
    suspicious_s: float = 0.4
    """An open operation or a heartbeat older than this makes the agent report at every poll."""
    idle_report_s: float = 1.0
    """Interval of reports of a node without workers of the generation."""
    diagnose_s: float = 0.2
    """The master judges this often."""
    window_blocks: int = 64
    """Finished blocks of each (group, rank) that the master holds."""
    agent_restart_s: float = 120.0
    """For so long after an agent's process ended while its node lives, its silence is no sign of a lost node."""
    start_grace_s: float = 30.0
    """A node whose agent has not reported yet in a generation counts as silent after this."""
    raise_grace_s: float = 30.0
    """After the user's loop raised, nothing is named for so long: the peers' broken operations follow from it."""
    stacks: bool = True
    """Take the stacks of ranks that a verdict of a hang names."""
    injection: bool = False
    """Accept orders to inject faults."""
    verdicts_kept: int = 1000
    diagnosis: DiagnosisSettings = field(default_factory=DiagnosisSettings)
    """What the diagnosis demands before it names a fault."""

    def __post_init__(self) -> None:
        for name in ("poll_s", "report_s", "diagnose_s", "idle_report_s", "suspicious_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, not {getattr(self, name)}.")
        if self.window_blocks < 4:
            raise ValueError(f"window_blocks must be at least 4, not {self.window_blocks}.")
