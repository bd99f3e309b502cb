"""A month of faults: nothing is lost without faults, times add up, and each assumption moves the row that it belongs to."""

from __future__ import annotations

import json

import pytest

from apps.c4.fleet.month import C4Assumptions, DefaultAssumptions, FaultMix, MonthConfig, Row, read_measured, replay
from apps.c4.month import month_rows, show_month
from apps.program.errors import UserError
from apps.program.run_folder import new_run_folder

CRASHES = FaultMix(crash=1, frozen=0, hang=0, slow=0)


def mean(config: MonthConfig, arm: str, row: Row, measured=None) -> float:
    months = replay(config, measured)[arm]
    return sum(one.shares[row] for one in months) / len(months) * config.days * 86400


def test_no_faults_no_loss():
    for months in replay(MonthConfig(faults=0, months=3)).values():
        assert all(one.total == 0 and one.restarts == 0 for one in months)


def test_the_same_seed_replays_the_same_months():
    config = MonthConfig(months=5, seed=3)
    assert replay(config) == replay(config)
    assert replay(config) != replay(MonthConfig(months=5, seed=4))


def test_hand_worked_crashes():
    # Transient crashes only: each costs a re-initialisation of 100 s, and half a checkpoint interval on average.
    config = MonthConfig(
        faults=10, months=100, mix=CRASHES, stays_broken=0, reinit_s=100, reinit_spread=0,
        default=DefaultAssumptions(checkpoint_s=1000, start_timeout_s=60),
        c4=C4Assumptions(both_lost=0, isolate_s=5),
    )  # fmt: skip
    assert mean(config, "default", Row.REINIT) == pytest.approx(1000, rel=0.01)
    assert mean(config, "default", Row.LOST) == pytest.approx(5000, rel=0.1)
    assert mean(config, "default", Row.DETECTION) == pytest.approx(10, rel=0.1)
    assert mean(config, "default", Row.ISOLATION) == pytest.approx(600, rel=0.01)
    assert mean(config, "c4", Row.REINIT) == pytest.approx(1000, rel=0.01)
    assert mean(config, "c4", Row.LOST) == pytest.approx(60, rel=0.1)
    assert mean(config, "c4", Row.ISOLATION) == pytest.approx(50, rel=0.2)


def test_a_part_that_stays_broken_comes_back_until_somebody_takes_it_out():
    broken = MonthConfig(faults=10, months=100, mix=CRASHES, stays_broken=1, c4=C4Assumptions(misses=0))
    months = replay(broken)
    assert all(one.restarts == 10 for one in months["c4"])
    assert 19 <= sum(one.restarts for one in months["default"]) / 100 <= 20


def test_the_month_is_never_longer_than_a_month():
    config = MonthConfig(days=1, faults=200, months=20, stays_broken=1)
    for months in replay(config).values():
        assert all(0 < one.total <= 1 + 1e-9 for one in months)


def test_measured_detection_times_are_used(tmp_path):
    file = tmp_path / "result.json"
    rows = [
        {"part": "trial", "expected": "non_communication_hang", "detection_s": 30.0, "right": True},
        {"part": "trial", "expected": "process_dead", "detection_s": 30.0, "right": True},
        {"part": "trial", "expected": "process_dead", "detection_s": 900.0, "right": False},
        {"part": "trial", "expected": "process_dead", "detection_s": None},
        {"part": "other"},
    ]
    file.write_text(json.dumps({"rows": rows}))
    measured = read_measured(file)
    config = MonthConfig(faults=10, months=20, mix=CRASHES, stays_broken=0)
    assert mean(config, "c4", Row.DETECTION, measured) == pytest.approx(300, rel=0.01)


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"rows": [{"detection_s": "soon"}]}'])
def test_a_file_without_trials_is_a_users_mistake(tmp_path, text):
    file = tmp_path / "result.json"
    file.write_text(text)
    with pytest.raises(UserError):
        read_measured(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_measured(tmp_path / "missing.json")


def test_the_run_folder_holds_table_assumptions_and_report(tmp_path, capsys):
    folder = new_run_folder("c4", tmp_path)
    config = MonthConfig(months=4)
    show_month(config, folder)
    result = json.loads((folder / "result.json").read_text())
    assert [row[""] for row in result["rows"]] == [*(row.value for row in Row), "total", "restarts"]
    page = (folder / "report.html").read_text()
    assert "peer_checkpoint_steps" in page
    assert "not a measurement" in page
    assert "assumption" in capsys.readouterr().out
    columns, rows = month_rows(replay(config))
    assert all(len(row) == len(columns) for row in rows)
