"""How far a ring's messages come: a dead connection shows a message begun and not received; starved ones show none."""

from __future__ import annotations

import numpy as np

from apps.c4.fleet.rings import ring_progress

NEVER = np.iinfo(np.int64).max


def play(inside: list[bool], stalled: dict[int, int]) -> tuple[list[int], list[int]]:
    stop = np.full((1, len(inside)), NEVER)
    for member, messages in stalled.items():
        stop[0, member] = messages
    sent, received = ring_progress(np.array([inside]), stop)
    return sent[0].tolist(), received[0].tolist()


def test_all_there_everything_arrives():
    assert play([True] * 4, {}) == ([6] * 4, [6] * 4)


def test_a_dead_connection_has_taken_one_message_more_than_it_gave():
    sent, received = play([True] * 4, {1: 2})
    assert [a - b for a, b in zip(sent, received, strict=True)] == [0, 1, 0, 0]
    # 2 has 2 messages and its own chunk to pass on, 3 one more, 0 one more still; then all stand.
    assert sent == [5, 3, 3, 4]


def test_an_absent_member_neither_takes_nor_gives():
    sent, received = play([True, True, False, True], {})
    assert sent[2] == 0
    assert (sent[1], received[1]) == (1, 0)
