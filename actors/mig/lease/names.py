"""Slices as Ray custom resources: names, and what a node has of them. Pure."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable

from actors.mig.backends import DeviceSlice


def resource_name(backend: str, profile: str) -> str:
    """``mig_1g_10gb`` for (mig, 1g.10gb), ``mig_1g_10gb_me`` for 1g.10gb+me, ``cpu_cpu2of7`` for (cpu, cpu2of7).

    Raises:
        ValueError: a name without letters or digits.
    """
    text = re.sub(r"[^a-z0-9]+", "_", profile.lower()).strip("_")
    if not text:
        raise ValueError(f"{profile!r} is no name of a profile.")
    return f"{backend}_{text}"


def node_resources(slices: Iterable[DeviceSlice]) -> dict[str, float]:
    """What ``ray start --resources`` wants for a node with these slices; numbers are whole."""
    counts = Counter(resource_name(found.backend, found.profile) for found in slices)
    return {name: float(count) for name, count in sorted(counts.items())}


def resources_argument(slices: Iterable[DeviceSlice]) -> str:
    """``node_resources`` as the JSON of the command line."""
    return json.dumps(node_resources(slices))
