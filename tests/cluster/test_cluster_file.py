"""ray_cluster.yaml: accepted by Ray's own validator, and saying what a Sextant cluster needs."""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import fillout_defaults, prepare_config, validate_config

REPOSITORY = Path(__file__).resolve().parents[2]
H100_COMPUTE_SLICES, H100_MEMORY_SLICES = 7, 8
MEMORY_SLICES = {"1g_10gb": 1, "1g_20gb": 2, "2g_20gb": 2, "3g_40gb": 4, "4g_40gb": 4, "7g_80gb": 8}


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())


@pytest.fixture(scope="module")
def prepared(written: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` makes it: with defaults, setup commands merged."""
    return prepare_config(copy.deepcopy(written))


def commands_of(config: dict[str, Any], node_type: str) -> list[str]:
    """All that a worker of this type runs; its own lists replace the common ones, as Ray's autoscaler has it."""
    own = config["available_node_types"][node_type]
    names = ("initialization_commands", "worker_setup_commands", "worker_start_ray_commands")
    return [command for name in names for command in own.get(name, config[name])]


def test_rays_validator_accepts_it(prepared: dict[str, Any]) -> None:
    validate_config(prepared)
    assert fillout_defaults(copy.deepcopy(prepared))["head_node_type"] == "head"


def test_rays_validator_would_refuse_a_mistake(prepared: dict[str, Any]) -> None:
    """That the validator above looks at all."""
    broken = copy.deepcopy(prepared)
    broken["available_node_types"]["mig_worker"]["resources"]["mig_1g_10gb"] = "two"
    with pytest.raises(jsonschema.ValidationError):
        validate_config(broken)
    broken = copy.deepcopy(prepared)
    broken["head_node_type"] = "nowhere"
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(broken)


def test_there_is_a_head_and_three_kinds_of_workers(prepared: dict[str, Any]) -> None:
    types = prepared["available_node_types"]
    assert set(types) == {"head", "cpu_worker", "gpu_worker", "mig_worker"}
    assert types["head"]["resources"]["CPU"] == 0, "work is not placed on the head"
    assert types["cpu_worker"]["resources"].get("GPU", 0) == 0
    assert types["gpu_worker"]["resources"]["GPU"] >= 1
    assert prepared["max_workers"] >= sum(types[name]["max_workers"] for name in types if name != "head")


def test_the_slices_fit_the_card_and_are_the_ones_that_are_cut(prepared: dict[str, Any]) -> None:
    worker = prepared["available_node_types"]["mig_worker"]
    slices = {name[len("mig_") :]: n for name, n in worker["resources"].items() if name.startswith("mig_")}
    assert sum(int(profile[0]) * n for profile, n in slices.items()) <= H100_COMPUTE_SLICES
    assert sum(MEMORY_SLICES[profile] * n for profile, n in slices.items()) <= H100_MEMORY_SLICES
    assert worker["resources"]["GPU"] == 0, "no task may take the whole card while it is cut"
    cut = next(found for c in commands_of(prepared, "mig_worker") if (found := re.search(r"mig -cgi (\S+)", c)))
    profiles = [profile.replace(".", "_") for profile in cut.group(1).split(",")]
    assert {profile: profiles.count(profile) for profile in profiles} == slices


@pytest.mark.parametrize("node_type", ["cpu_worker", "gpu_worker", "mig_worker"])
def test_every_worker_sets_up_and_joins_with_the_token(prepared: dict[str, Any], node_type: str) -> None:
    commands = commands_of(prepared, node_type)
    assert any("make setup" in command for command in commands)
    assert any(".ray" in command and "mkdir" in command for command in commands), "the token's folder must be there"
    start = next(command for command in commands if "ray start --address" in command)
    assert "RAY_AUTH_MODE=token" in start
    assert prepared["file_mounts"]["/home/ubuntu/.ray/auth_token"].endswith("/.ray/auth_token")


def test_the_head_starts_with_the_token_and_a_private_dashboard(prepared: dict[str, Any]) -> None:
    start = next(command for command in prepared["head_start_ray_commands"] if "ray start" in command)
    assert "RAY_AUTH_MODE=token" in start
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
    assert any("make setup" in command for command in prepared["head_setup_commands"])


def test_the_code_goes_up_without_what_is_made_on_each_machine(prepared: dict[str, Any]) -> None:
    assert prepared["file_mounts"]["/home/ubuntu/sextant"] in (".", str(REPOSITORY))
    assert {".venv", ".git", "runs"} <= set(prepared["rsync_exclude"])


def test_the_commands_are_shell_and_ray_start_takes_their_options(prepared: dict[str, Any]) -> None:
    lists = ["initialization_commands", "head_setup_commands", "head_start_ray_commands"]
    commands = [command for name in lists for command in prepared[name]]
    for node_type in ("cpu_worker", "gpu_worker", "mig_worker"):
        commands += commands_of(prepared, node_type)
    for command in set(commands):
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0, command

    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    for command in set(commands):
        if "ray start" in command:
            used = {
                word.partition("=")[0] for word in shlex.split(command.split("ray start")[1]) if word.startswith("--")
            }
            assert used <= known
