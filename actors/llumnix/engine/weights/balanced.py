"""Balanced checkpoints: folders whose matrices are packed, k non-zeros in every block. Written by ``save``, opened by loading.py.

A folder holds ``balanced.safetensors`` (kernels.balanced's file; weights under the names of ``expected_shapes``),
``balanced.json`` (the configuration) and the tokenizer's files as in a Hugging Face folder. Which matrices are balanced, the
file says; the others are dense and take the engine's dtype.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from actors.llumnix.engine.model_config import ModelConfig, ModelLoadError, RopeConfig
from actors.llumnix.engine.weights.huggingface import read_json
from actors.llumnix.engine.weights.source import check_shape, expected_shapes, fingerprint_files
from kernels import balanced
from kernels.balanced import BalancedFormatError, BalancedSpec, BalancedWeight

CONFIG_FILE = "balanced.json"
WEIGHTS_FILE = "balanced.safetensors"
VERSION = 1


def is_balanced(folder: Path) -> bool:
    """Whether a model folder is a balanced checkpoint."""
    return (folder / CONFIG_FILE).is_file()


def read_config(folder: Path) -> ModelConfig:
    """The decoder's configuration of a balanced checkpoint. ModelLoadError if it is broken."""
    path = folder / CONFIG_FILE
    content = read_json(path)
    if content.get("version") != VERSION:
        raise ModelLoadError(f"{path} has version {content.get('version')!r}; this code reads version {VERSION}")
    try:
        raw = dict(content["config"])
        rope = dict(raw.pop("rope"))
        if rope.get("freq_factors") is not None:
            rope["freq_factors"] = tuple(map(float, rope["freq_factors"]))
        raw["eos_token_ids"] = tuple(map(int, raw["eos_token_ids"]))
        config = ModelConfig(rope=RopeConfig(**rope), **raw)
        return config.validate(str(path))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{path} does not describe a decoder: {error!r}") from None


def save(folder: Path, config: ModelConfig, tensors: Mapping[str, BalancedWeight | torch.Tensor]) -> None:
    """Writes configuration and weights (names and shapes of ``expected_shapes``) into ``folder``; the tokenizer is the caller's.

    Raises ValueError for names or shapes that are not the model's.
    """
    shapes = expected_shapes(config)
    if set(tensors) != set(shapes):
        raise ValueError(f"not the weights of this model: {', '.join(sorted(set(tensors) ^ set(shapes)))[:200]} differ")
    for name, item in tensors.items():
        if _shape(item) != shapes[name]:
            raise ValueError(f"{name} is {list(_shape(item))}, and the configuration promises {list(shapes[name])}")
    folder.mkdir(parents=True, exist_ok=True)
    balanced.save(folder / WEIGHTS_FILE, tensors)
    # Last: a folder without it is no checkpoint.
    (folder / CONFIG_FILE).write_text(json.dumps({"version": VERSION, "config": asdict(config)}, indent=1) + "\n")


class BalancedSource:
    """A ``WeightSource`` over a balanced checkpoint. ``tensor`` gives dense weights, ``joined`` packed ones."""

    def __init__(self, folder: Path):
        """Reads and checks the whole file. ModelLoadError with one sentence if it is missing, tampered or of another model."""
        self.path = folder
        self.config = read_config(folder)
        path = folder / WEIGHTS_FILE
        try:
            self._items: dict[str, Any] = balanced.load(path, layout="rows")
        except BalancedFormatError as error:
            raise ModelLoadError(str(error)) from None
        for name, shape in expected_shapes(self.config).items():
            if name not in self._items:
                raise ModelLoadError(f"{path} lacks the tensor {name}")
            check_shape(path, name, _shape(self._items[name]), shape)
        self.fingerprint = fingerprint_files([path], (folder / CONFIG_FILE).read_bytes())

    def tensor(self, name: str) -> torch.Tensor:
        """See ``WeightSource``; a balanced weight comes unpacked, with zeros."""
        item = self._items[name]
        return item.unpack() if isinstance(item, BalancedWeight) else item

    def joined(self, names: Sequence[str]) -> BalancedWeight | None:
        """Balanced weights of the same inputs as one, bit for bit, their rows one after the other, as the CPU kernels read it.

        None if they cannot be one: some are dense, or their k, block or value type differ.
        """
        items = [self._items[name] for name in names]
        if not all(isinstance(item, BalancedWeight) for item in items):
            return None
        first: BalancedSpec = items[0].spec
        alike = [f.name for f in fields(first) if f.name != "rows"]
        if any(getattr(item.spec, name) != getattr(first, name) for item in items for name in alike):
            return None
        if len(items) > 1 and any(item.spec.rows % first.vector for item in items[:-1]):
            return None
        spec = BalancedSpec(
            **{**{f.name: getattr(first, f.name) for f in fields(first)}, "rows": sum(item.rows for item in items)}
        )
        parts = (torch.cat([getattr(item, part) for item in items]) for part in ("values", "index", "scales"))
        return BalancedWeight(spec, *parts).to_layout("lanes")


def _shape(item: BalancedWeight | torch.Tensor) -> tuple[int, ...]:
    return (item.rows, item.columns) if isinstance(item, BalancedWeight) else tuple(item.shape)
