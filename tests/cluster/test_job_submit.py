"""``ray job submit --working-dir . -- python -m ...`` against a head node with token authentication."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.ray_head import BIN, REPOSITORY, RayHead

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def submit(head: RayHead, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "ray"), "job", "submit", "--address", head.dashboard, "--working-dir", "."]
    command += ["--", "python", "-m", "tests.cluster.small_job"]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=150)


def test_a_job_runs_the_uploaded_code_on_the_cluster(ray_head: RayHead) -> None:
    done = submit(ray_head, ray_head.client_environment(mode="token"))
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if "FOUND " in line)
    found = json.loads(line.partition("FOUND ")[2])
    assert found["started"] is False, "the job must attach to the cluster that runs it"
    assert found["address"].endswith(f":{ray_head.port}")
    assert found["worker_runs_uploaded_code"]
    assert found["worker_deadline"] == "1"
    assert {"apps", "actors", "kernels"} <= set(found["folders"])
    assert not {".venv", ".git", "runs", "build"} & set(found["folders"])
    assert found["uploaded_mib"] < 20
    assert ray_head.alive(), "a job that ends must not stop the cluster"


def test_without_the_token_a_job_is_refused(ray_head: RayHead) -> None:
    done = submit(ray_head, ray_head.client_environment(token="0" * 32, mode="token"))
    assert done.returncode != 0
    assert "oken" in done.stdout + done.stderr
