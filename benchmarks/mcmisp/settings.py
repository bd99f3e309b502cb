"""What the mcmisp benchmarks train on and with: docstrings of installed packages, so that every machine can run them."""

from __future__ import annotations

from apps.mcmisp.config import McmispConfig

QUICK_PACKAGES = ["numpy", "networkx"]


def settings(quick: bool, **sections: dict) -> McmispConfig:
    """The benchmarks' configuration; ``quick`` reads few packages. ``sections`` override keys of theirs."""
    data: dict = {"vocab_size": 8192}
    if quick:
        data |= {"packages": QUICK_PACKAGES, "standard_library": False, "vocab_size": 4096}
    base: dict[str, dict] = {"data": data, "training": {"threads": 1, "checkpoint_every": None}}
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}}
    return McmispConfig.model_validate(merged)
