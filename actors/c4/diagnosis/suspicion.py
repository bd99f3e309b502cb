"""What a rule suspects at one look; the entry point turns suspicions that last into verdicts."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from actors.c4.diagnosis.layout import Places
from actors.c4.diagnosis.verdict import Culprit, FaultKind, Verdict


@dataclass(frozen=True)
class Suspicion:
    """A verdict in the making. Fields as of ``Verdict``."""

    kind: FaultKind
    evidence: tuple[str, ...]
    confidence: float
    onset_s: float
    ranks: tuple[int, ...] = ()
    link: tuple[int, int] | None = None
    group: str = ""
    sequence: int = 0
    slowdown: float = 1.0
    hold_s: float = 0.0
    """How long it must be seen before it is named."""
    busy: bool = False
    """A slowness on a busy host: it must be seen without a break."""
    cells: tuple[tuple[int, int], ...] = ()
    """Of a slow sender or receiver: its connections, which need no verdicts of their own."""

    @property
    def key(self) -> Hashable:
        """What makes it the same fault at the next look."""
        return (self.kind, self.ranks, self.link)

    @property
    def parts(self) -> tuple[Hashable, ...]:
        """The parts that it blames; a part that is blamed for a hang is not blamed for another kind of hang again."""
        slow = self.kind.fault_class.value.endswith("slow")
        if self.link is not None:
            return ((slow, self.kind.fault_class, self.link),)
        # Being slow at work and being slow at sending are two things; all hangs of a rank are one.
        what = self.kind if slow else ""
        return tuple((slow, what, rank) for rank in self.ranks)

    @property
    def settles(self) -> tuple[Hashable, ...]:
        """The parts that need no word more once this one is named."""
        return self.parts + tuple((True, self.kind.fault_class, cell) for cell in self.cells)

    def verdict(self, found_s: float, onset_s: float, places: Places) -> Verdict:
        """The verdict that it becomes."""
        where = places.names_of(*self.link) if self.link is not None else places.names_of(*self.ranks)
        return Verdict(
            kind=self.kind,
            culprit=Culprit(self.ranks, self.link, where),
            evidence=self.evidence,
            confidence=self.confidence,
            onset_s=min(onset_s, found_s),
            found_s=found_s,
            group=self.group,
            sequence=self.sequence,
            slowdown=self.slowdown,
        )
