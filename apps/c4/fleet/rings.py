"""How far the messages of a ring operation come when some members are absent or a connection is dead: played out hop by hop."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def ring_progress(
    inside: NDArray[np.bool_], stalled_at: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """([G, n], [G, n]): messages that each member has begun to send, and that its successor has received whole.

    Args:
        inside: [G, n]: members of each ring that take part.
        stalled_at: [G, n]: number of messages after which a member's outgoing connection carries nothing more.

    A member begins message i once it has received message i - 1 of the 2 (n - 1); its own chunk comes first. Nobody begins one
    before its last was taken, so a dead connection has one message begun and not received.
    """
    n = inside.shape[1]
    total = 2 * (n - 1)
    takes = np.roll(inside, -1, axis=1)
    sent = np.zeros(inside.shape, dtype=np.int64)
    received = np.zeros(inside.shape, dtype=np.int64)
    while True:
        has = np.roll(received, 1, axis=1)  # from its predecessor
        begins = inside & (sent < np.minimum(has + 1, total)) & (sent == received)
        sent = sent + begins
        arrives = takes & (received < sent) & (received < stalled_at)
        received = received + arrives
        if not (begins.any() or arrives.any()):
            return sent, received
