"""ray_cluster.yaml's MIG worker type: it declares the slices that it cuts, by the names that leases use."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import yaml

from actors.mig.backends import DeviceSlice
from actors.mig.backends.simulated import SimBackend
from actors.mig.lease.names import node_resources

CLUSTER = Path(__file__).resolve().parents[4] / "ray_cluster.yaml"


def test_the_resources_are_those_of_the_slices_that_are_cut() -> None:
    node = yaml.safe_load(CLUSTER.read_text())["available_node_types"]["mig_worker"]
    cut = re.search(r"mig -cgi (\S+)", " ".join(node["initialization_commands"]))
    assert cut
    profiles = cut[1].split(",")
    slices = [DeviceSlice(str(number), "mig", "H100-80GB", profile) for number, profile in enumerate(profiles)]
    declared = {name: float(count) for name, count in node["resources"].items() if name.startswith("mig_")}
    assert declared == node_resources(slices)
    assert node["resources"]["GPU"] == 0
    backend = SimBackend("H100-80GB")
    backend.repartition(profiles)
    assert Counter(found.profile for found in backend.slices()) == Counter(profiles)
