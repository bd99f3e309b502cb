"""What ended a generation: the user's loop, a dead process, broken communication. Pure: exceptions in, a cause out. No Ray.

When one rank fails, its peers fail with it a moment later (a closed connection). The cause is what is not explained by a peer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    LOOP = "loop"
    """The user's loop raised: counts in the user's FailureConfig, says nothing of the hardware."""
    DEATH = "death"
    """A worker's process or node is gone."""
    COMMUNICATION = "communication"
    """Only broken communication was seen, and no rank that explains it."""
    START = "start"
    """The workers could not be started."""


@dataclass(frozen=True)
class Failure:
    """Why a generation ended."""

    cause: Cause
    ranks: tuple[int, ...]
    """Whom the cause concerns, ascending; the collateral ranks are not named."""
    text: str
    """One line."""


_COMMUNICATION_TYPES = frozenset(
    {"DistBackendError", "DistNetworkError", "DistStoreError", "DistError", "ConnectionError", "ConnectionResetError",
     "ConnectionAbortedError", "ConnectionRefusedError", "BrokenPipeError"}
)  # fmt: skip
_COMMUNICATION_TEXT = re.compile(
    r"connection (was )?(reset|closed|refused|aborted)|closed by peer|broken pipe|gloo|nccl|process group|timed out"
    r"|timeout|socket|peer rank|TCPStore|left the ring|communicator",
    re.IGNORECASE,
)


def is_communication(error: BaseException) -> bool:
    """Whether an exception of the loop may be the echo of a peer's failure."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _COMMUNICATION_TYPES or any(name.startswith(("Recorder", "Ring", "Transport")) for name in names):
        return True
    return type(error) is RuntimeError and bool(_COMMUNICATION_TEXT.search(str(error)))


def classify(raised: Mapping[int, BaseException], died: Mapping[int, str]) -> Failure:
    """The cause of a failed poll.

    Args:
        raised: exceptions of loops by rank.
        died: ranks whose process is gone (or no longer answers), with the reason.
    """
    own = {rank: error for rank, error in raised.items() if not is_communication(error)}
    if own and not died:
        rank = min(own)
        return Failure(Cause.LOOP, tuple(sorted(own)), f"rank {rank}: {_line(own[rank])}")
    if died:
        rank = min(died)
        return Failure(Cause.DEATH, tuple(sorted(died)), f"rank {rank}: {died[rank]}")
    rank = min(raised)
    return Failure(Cause.COMMUNICATION, tuple(sorted(raised)), f"rank {rank}: {_line(raised[rank])}")


def needs_a_closer_look(raised: Mapping[int, BaseException], died: Mapping[int, str]) -> bool:
    """Only echoes so far: what they echo will be seen in a moment."""
    return bool(raised) and not died and all(is_communication(error) for error in raised.values())


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")
