"""Real fits under C4 on a virtual cluster: killed and stopped workers, a loop that raises, DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.ray_head import REPOSITORY

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("SEXTANT_C4_FITS"),
        reason="real fits with faults take many minutes on two busy cores: set SEXTANT_C4_FITS=1",
    ),
]


def run(*scenarios: str, timeout_s: float) -> dict[str, Any]:
    """What the scenarios found, in a process of their own (tests/cluster/c4_fits.py)."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    path = f"{REPOSITORY}{os.pathsep}{os.path.dirname(sys.executable)}"  # noqa: PTH120 - DeepSpeed looks for ninja on PATH
    environment |= {"PYTHONPATH": str(REPOSITORY), "PATH": f"{path}{os.pathsep}{environment['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.c4_fits", *scenarios],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip
    found = dict(line.split(" ", 2)[1:] for line in done.stdout.splitlines() if line.startswith("FOUND "))
    assert set(found) == set(scenarios), done.stdout[-4000:] + done.stderr[-4000:]
    return {name: json.loads(text) for name, text in found.items()}


@pytest.fixture(scope="module")
def fits() -> dict[str, Any]:
    return run("faults", "mistake", "deepspeed", timeout_s=600)


@pytest.mark.timeout(620)  # the first test waits for all fits; busy machines take minutes
def test_a_killed_and_a_stopped_worker_lose_no_step_and_do_not_come_back(fits: dict[str, Any]) -> None:
    found = fits["faults"]
    assert found["capped"] == [False, False]
    assert found["steps_lost"] == [0, 0]
    assert found["survivors"] == [0, 0], "a stopped process of the old generation was left alive"
    assert found["causes"] == ["death", "death"]
    assert all(version for version in found["resumed_from"]), "resumed from memory, not from disk or the beginning"


def test_the_resumed_run_is_the_unbroken_run_bit_by_bit(fits: dict[str, Any]) -> None:
    """Dropout draws, Adam's moments, the position in the data: any of them lost would change a loss."""
    found = fits["faults"]
    truth = found["unbroken_losses"]
    assert len(truth) == found["steps"]
    assert len(found["losses"]) >= found["steps"] - 2  # a kill may fall between a step's end and its record
    for step, pairs in found["losses"].items():
        for pair in pairs:
            assert pair in truth[step], f"step {step}"
    assert found["last_step"] == found["steps"] - 1, "Result.checkpoint is the last one reported"
    assert found["same_weights"]


def test_the_fault_is_named_and_its_node_left_out(fits: dict[str, Any]) -> None:
    found = fits["faults"]
    kinds = {(verdict["kind"], rank) for verdict in found["verdicts"] for rank in verdict["ranks"]}
    assert ("process_dead", 1) in kinds
    assert {kind for kind, rank in kinds if rank == 0} & {"process_stopped", "heartbeat_lost"}
    assert all(found["excluded"]), "each restart was kept off the culprit's node"
    assert set(found["quarantined"]) | set(found["released"]) >= {node for nodes in found["excluded"] for node in nodes}


def test_nothing_is_left_in_memory(fits: dict[str, Any]) -> None:
    assert fits["faults"]["left_in_memory"] == []


def test_the_loops_own_error_reaches_the_user_first_and_within_the_budget(fits: dict[str, Any]) -> None:
    found = fits["mistake"]
    assert "ValueError: labels must be below 10" in found["error"]
    assert found["first_rank"] == 1
    assert found["runs"] == 2, "max_failures=1 allows one more run"
    assert "evict" not in found["verdicts"]


def test_a_deepspeed_zero_loop_resumes_bit_by_bit(fits: dict[str, Any]) -> None:
    found = fits["deepspeed"]
    assert found["restarts"] == 1
    for step, pairs in found["losses"].items():
        for pair in pairs:
            assert pair in found["unbroken_losses"][step], f"step {step}"
    assert len(found["losses"]) >= 11
