"""`paths plan` and `paths simulate` end with a report, and say what is wrong with a fabric."""

from __future__ import annotations

import json

import pytest

from apps.c4.paths.verbs import paths
from apps.program.errors import UserError


def test_plan_writes_every_flow_and_its_bound(tmp_path):
    assert paths("plan", out=str(tmp_path)) == 0
    result = json.loads(next(tmp_path.rglob("result.json")).read_text())
    assert result["rate_gbps"] == pytest.approx(result["bound"]["upper_gbps"])
    assert len(result["flows"]["spine"]) == 512 and result["nccl"]["NCCL_IB_QPS_PER_CONNECTION"] == "4"


def test_simulate_draws_loads_bandwidth_and_the_failure(tmp_path):
    assert paths("simulate", seeds=2, out=str(tmp_path)) == 0
    result = json.loads(next(tmp_path.rglob("result.json")).read_text())
    assert result["gain"] > 0.3 and result["after_failure_gbps"] <= result["after_failure_bound_gbps"] * (1 + 1e-9)
    assert len(list(tmp_path.rglob("*.png"))) == 3 and list(tmp_path.rglob("report.html"))


@pytest.mark.parametrize(
    ("action", "fabric", "sentence"), [("fly", "paper", "plan or simulate"), ("plan", "no.yaml", "cannot be read")]
)
def test_mistakes_are_sentences(action, fabric, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        paths(action, fabric=fabric, out=str(tmp_path))
