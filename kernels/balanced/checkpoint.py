"""Balanced weights on disk: one safetensors file, the ``rows`` layout with the smallest index, a digest over every tensor.

A file that was cut, edited or mixed up ends in a BalancedFormatError that says where, never in a wrong number.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kernels.balanced.format import BalancedWeight, layout_of
from kernels.balanced.spec import BalancedFormatError, BalancedSpec, Layout

KEY = "sextant_balanced"
VERSION = 1
PARTS = ("values", "index", "scales")


def save(path: str | Path, tensors: Mapping[str, BalancedWeight | torch.Tensor]) -> None:
    """Write weights and ordinary tensors (biases, embeddings) under their names; the file appears whole or not at all.

    Raises BalancedFormatError for a name that collides with a part of a balanced weight.
    """
    path = Path(path)
    flat: dict[str, torch.Tensor] = {}
    specs: dict[str, dict[str, Any]] = {}
    for name, item in tensors.items():
        parts = {name: item}
        if isinstance(item, BalancedWeight):
            rows = item.to_layout("rows")
            # Weights that came in the rows layout may have another index than the smallest.
            rows = (
                rows
                if rows.spec == rows.spec.with_smallest_index("rows")
                else rows.to_layout("lanes").to_layout("rows")
            )
            specs[name] = asdict(rows.spec)
            parts = {f"{name}.{part}": tensor for part, tensor in rows.tensors().items()}
        for key, tensor in parts.items():
            if key in flat:
                raise BalancedFormatError(f"two tensors would be called {key!r}")
            flat[key] = tensor.detach().cpu().contiguous()  # type: ignore[union-attr]
    digests = {key: _digest(tensor) for key, tensor in flat.items()}
    content = {"version": VERSION, "specs": specs, "digests": digests}
    metadata = {KEY: json.dumps(content, separators=(",", ":")), f"{KEY}_digest": _digest_of(content)}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(
            {key: tensor.clone() if _shares(tensor) else tensor for key, tensor in flat.items()}, temporary, metadata
        )
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def load(
    path: str | Path, device: torch.device | str = "cpu", layout: Layout | None = None
) -> dict[str, BalancedWeight | torch.Tensor]:
    """What ``save`` wrote, bit for bit; weights in the layout that ``device`` computes with unless ``layout`` says another.

    Raises:
        BalancedFormatError: no such file, no safetensors, no balanced checkpoint, or one whose bytes were changed.
    """
    path = Path(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            content = _content(path, file.metadata() or {})
            flat = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise BalancedFormatError(f"there is no file {path}") from error
    except (SafetensorError, OSError) as error:
        raise BalancedFormatError(f"{path} is not a whole safetensors file: {error}") from error
    digests = content["digests"]
    if set(digests) != set(flat):
        raise BalancedFormatError(f"{path} lacks or adds tensors: {', '.join(sorted(set(digests) ^ set(flat)))}")
    for key, tensor in flat.items():
        if digests[key] != _digest(tensor):
            raise BalancedFormatError(f"{path}: the bytes of {key} are not those that were written")
    loaded: dict[str, BalancedWeight | torch.Tensor] = {}
    for name, fields in content["specs"].items():
        parts = {part: flat.pop(f"{name}.{part}", None) for part in PARTS}
        if any(tensor is None for tensor in parts.values()):
            raise BalancedFormatError(f"{path}: {name} lacks its values, index or scales")
        try:
            weight = BalancedWeight(BalancedSpec(**fields), **parts)  # type: ignore[arg-type]
            weight.validate()
        except (TypeError, BalancedFormatError) as error:
            raise BalancedFormatError(f"{path}: {name} is broken: {error}") from error
        wanted: Layout = layout or layout_of(device)
        loaded[name] = weight.to_layout(wanted).to(device)
    return {**loaded, **{key: tensor.to(device) for key, tensor in flat.items()}}


def _content(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if KEY not in metadata:
        raise BalancedFormatError(f"{path} is no balanced checkpoint: its metadata has no {KEY!r}")
    try:
        content = json.loads(metadata[KEY])
        version, specs, digests = content["version"], content["specs"], content["digests"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise BalancedFormatError(f"{path}: its metadata cannot be read: {error!r}") from error
    if (
        metadata.get(f"{KEY}_digest") != _digest_of(content)
        or not isinstance(specs, dict)
        or not isinstance(digests, dict)
    ):
        raise BalancedFormatError(f"{path}: its metadata is not what was written")
    if version != VERSION:
        raise BalancedFormatError(f"{path} has version {version}; this code reads version {VERSION}")
    return content


def _digest(tensor: torch.Tensor) -> str:
    """Of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    if tensor.numel():
        # One element may have any stride and still be contiguous; its bytes need the stride 1.
        flat = tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        digest.update(flat.numpy().data)  # type: ignore[arg-type]
    return digest.hexdigest()


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _shares(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a part of a larger storage, which safetensors refuses."""
    return tensor.untyped_storage().nbytes() != tensor.nbytes
