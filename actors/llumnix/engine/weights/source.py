"""What every model file looks like from the inside: a configuration and weights under one set of names.

Between the readers (gguf.py, huggingface.py) and the decoders (model_*.py). Weights are read one at a time, so that a
model never stands in memory twice.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import torch

from actors.llumnix.engine.model_config import ModelConfig, ModelLoadError

LAYER_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


class WeightSource(Protocol):
    """A model file that was opened and whose metadata is sound."""

    path: Path
    """The GGUF file or the Hugging Face folder."""
    config: ModelConfig
    fingerprint: str
    """Hex digest: equal digests mean equal weights."""

    def tensor(self, name: str) -> torch.Tensor:
        """The fp32 or stored-precision weight of that name (see ``expected_shapes``), shape checked. ModelLoadError."""
        ...


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a model. Matrices are [out, in]; layer i's weights are named ``layers.i.<name>``."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {"embed": (c.vocab_size, c.hidden_size), "final_norm": (c.hidden_size,)}
    if not c.tie_word_embeddings:
        shapes["lm_head"] = (c.vocab_size, c.hidden_size)
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (c.hidden_size,),
        "q": (c.q_size, c.hidden_size),
        "k": (c.kv_size, c.hidden_size),
        "v": (c.kv_size, c.hidden_size),
        "o": (c.hidden_size, c.q_size),
        "ffn_norm": (c.hidden_size,),
        "gate": (c.intermediate_size, c.hidden_size),
        "up": (c.intermediate_size, c.hidden_size),
        "down": (c.hidden_size, c.intermediate_size),
    }
    if c.qkv_bias:
        layer |= {"q_bias": (c.q_size,), "k_bias": (c.kv_size,), "v_bias": (c.kv_size,)}
    if c.o_bias:
        layer["o_bias"] = (c.hidden_size,)
    if c.qk_norm:
        layer |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
    for i in range(c.num_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def check_shape(path: Path, stored_name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """ModelLoadError if a stored tensor has another shape than the configuration promises."""
    if tuple(shape) != tuple(expected):
        raise ModelLoadError(
            f"{path}: tensor {stored_name} has shape {list(shape)}, and the configuration promises {list(expected)}"
        )


FULL_HASH_BYTES = 512 << 20
SAMPLE_BYTES = 1 << 16
SAMPLES = 4096


def fingerprint_files(paths: list[Path], extra: bytes = b"") -> str:
    """SHA-256 over the files' sizes and contents. Of a file over 512 MiB, 4,096 evenly spaced pieces of 64 KiB are read:
    enough to tell models and finetunes apart, at a start-up cost that does not grow with the model."""
    digest = hashlib.sha256(extra)
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            if size <= FULL_HASH_BYTES:
                while piece := file.read(1 << 22):
                    digest.update(piece)
            else:
                for i in range(SAMPLES):
                    file.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
