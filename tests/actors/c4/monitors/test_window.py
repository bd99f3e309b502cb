"""The window over a node's reports: blocks are kept once, handed out once as fresh, and old ones leave."""

from __future__ import annotations

import numpy as np

from actors.c4.diagnosis.observation import Group
from actors.c4.monitors.window import Window
from tests.actors.c4.monitors.rows import DP, observation


def report(blocks: range, groups: tuple[Group, ...] = (DP,), index: int = 0):
    rows = [(index, 0, block, 0.01, 0.02, 0.0) for block in blocks]
    links = [(index, 3, 0, block, 1000, 0.001) for block in blocks]
    return observation("n0", (0,), groups=groups, blocks=rows, link_blocks=links)


def test_blocks_add_up_and_old_ones_leave() -> None:
    window = Window(4)
    for start in (0, 2, 4):
        window.take(report(range(start, start + 2)), 0.0)
    held = window.observation(0.0)
    assert held.blocks.block.tolist() == [2, 3, 4, 5]
    assert held.link_blocks.block.tolist() == [2, 3, 4, 5]


def test_a_window_that_is_sent_again_counts_once() -> None:
    window = Window(8)
    window.take(report(range(3)), 0.0)
    window.take(report(range(5)), 0.0)  # a restarted agent
    assert sorted(window.observation(0.0).blocks.block.tolist()) == [0, 1, 2, 3, 4]


def test_fresh_blocks_are_handed_out_once() -> None:
    window = Window(8)
    window.take(report(range(2)), 0.0)
    window.take(report(range(2, 3)), 0.0)
    assert window.observation(0.0, fresh=True).blocks.block.tolist() == [0, 1, 2]
    assert window.observation(0.0, fresh=True).blocks.block.tolist() == []
    assert window.observation(0.0).blocks.block.tolist() == [0, 1, 2], "they are still held for who looks"


def test_rows_follow_their_group_to_its_new_place() -> None:
    tp = Group("1", "tp", (0, 1))
    window = Window(8)
    window.take(report(range(2), (DP,)), 0.0)
    window.take(report(range(2, 3), (tp, DP), index=1), 0.0)
    held = window.observation(0.0)
    assert {held.groups[index].name for index in held.blocks.group} == {"0"}


def test_silence_ages_the_rows_unless_it_is_excused() -> None:
    window = Window(8)
    window.take(report(range(1)), 100.0)
    np.testing.assert_allclose(window.observation(103.0).ranks.report_age_s, [3.0])
    np.testing.assert_allclose(window.observation(103.0, aging=False).ranks.report_age_s, [0.0])
