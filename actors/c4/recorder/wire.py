"""What ring connections say to one another: frames, and the announcement that both ends of an operation compare. No torch.

A frame is a header of four numbers and a payload. Forwards travel ANNOUNCE (once an operation), PIECE (data) and, when a rank
gives up, ABORT with a sentence; backwards only ABORT. The sentence reaches every rank, so all name the same peer and reason.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from actors.c4.recorder.records import ElementType, OpType

FRAME = struct.Struct("<IIII")
"""kind, piece, hop, bytes of payload."""
ANNOUNCE, PIECE, ABORT = 0x43344101, 0x43344102, 0x43344103
ANNOUNCEMENT = struct.Struct("<qqiBBBB")
ABORT_BYTES = 600
REDUCTIONS = ("none", "sum", "avg")
FORMS = ("ordered", "rotated")


@dataclass(frozen=True)
class Announcement:
    """What all ranks of a group must agree upon in one operation."""

    sequence: int
    payload: int
    """Bytes."""
    root: int
    """Ring rank; -1 for none."""
    op_type: int
    element_type: int
    reduction: int = 0
    """Index into ``REDUCTIONS``."""
    form: int = 0
    """Index into ``FORMS``."""

    def pack(self) -> bytes:
        return ANNOUNCEMENT.pack(
            self.sequence, self.payload, self.root, self.op_type, self.element_type, self.reduction, self.form
        )

    @classmethod
    def unpack(cls, data: bytes) -> Announcement:
        return cls(*ANNOUNCEMENT.unpack(data))

    def __str__(self) -> str:
        name = _name(OpType, self.op_type)
        extra = "" if self.reduction == 0 or self.reduction >= len(REDUCTIONS) else f" ({REDUCTIONS[self.reduction]})"
        form = f", {FORMS[self.form]} form" if 0 < self.form < len(FORMS) else ""
        root = f", root {self.root}" if self.root >= 0 else ""
        return f"{name}{extra} #{self.sequence} of {self.payload:,} bytes of {_name(ElementType, self.element_type)}{root}{form}"


def _name(kind: type[OpType] | type[ElementType], number: int) -> str:
    try:
        return kind(number).name.lower()
    except ValueError:
        return f"{kind.__name__} {number}"
