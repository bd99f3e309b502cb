"""The verb `simulate`: the tables, the run folder with its pictures, and clear words for numbers that do not do."""

from __future__ import annotations

import json

import pytest

from apps.c4.simulate import example_pictures, simulate
from apps.program.errors import UserError


def test_a_small_campaign_leaves_a_report_with_pictures(tmp_path, capsys):
    assert (
        simulate(ranks=64, faults=2, pairs=False, slowdown=2.0, noise=0.1, seed=1, processes=1, out=str(tmp_path)) == 0
    )
    (folder,) = [path for path in (tmp_path / "c4").iterdir() if not path.is_symlink()]
    result = json.loads((folder / "result.json").read_text())
    assert result["trials"] == 2
    assert 0 <= result["accuracy"] <= 1
    assert len(list(folder.glob("*.png"))) == 2
    assert "Accuracy by class" in capsys.readouterr().out


def test_the_waiting_chain_of_the_picture_ends_at_the_culprit():
    (_, _, _), (_, chain, _) = example_pictures(seed=0)
    assert len(chain.axes[0].patches) >= 15  # every other rank waits for somebody


@pytest.mark.parametrize("numbers", [{"ranks": 100, "slowdown": 1.5}, {"ranks": 64, "slowdown": 9.0}])
def test_numbers_that_do_not_do_are_a_users_mistake(tmp_path, numbers):
    with pytest.raises(UserError):
        simulate(faults=1, pairs=False, noise=0.1, seed=0, processes=1, out=str(tmp_path), **numbers)
