"""GGUF files: metadata and tensors of a Llama, Qwen2 or Qwen3 model in llama.cpp's container. Opened by loading.py.

The container is parsed here rather than by the ``gguf`` library's reader because that one takes seconds for a tokenizer's
100,000 strings and trusts the counts in the file; block formats and their sizes come from the library.
Source of the format: ggml/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from actors.llumnix.engine.model_config import ModelConfig, ModelLoadError, RopeConfig
from actors.llumnix.engine.weights.dequantise import dequantise, is_supported
from actors.llumnix.engine.weights.source import check_shape, expected_shapes, fingerprint_files

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ARRAY_DTYPES = {kind: np.dtype("<" + ("B" if code == "?" else code)) for kind, code in _SCALARS.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in the file and how it is stored. ``shape`` is torch's order: rows first."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class _Cursor:
    """Reads numbers and strings from the header; ModelLoadError past the end."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.at = path, data.data, 0

    def bytes(self, count: int) -> memoryview:
        piece = self.data[self.at : self.at + count]
        if len(piece) != count:
            raise ModelLoadError(f"{self.path} is truncated: its header goes on past the end of the file")
        self.at += count
        return piece

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        raw = self.bytes(self.number("Q"))
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise ModelLoadError(f"{self.path} is damaged: a string in its header is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            of, count = self.number("I"), self.number("Q")
            if of == _STRING:
                if count * 8 > len(self.data) - self.at:
                    raise ModelLoadError(f"{self.path} is truncated: its header goes on past the end of the file")
                return [self.string() for _ in range(count)]
            if of in _ARRAY_DTYPES:
                dtype = _ARRAY_DTYPES[of]
                return np.frombuffer(self.bytes(count * dtype.itemsize), dtype).tolist()
            raise ModelLoadError(f"{self.path} is damaged: its header holds an array of unknown type {of}")
        raise ModelLoadError(f"{self.path} is damaged: its header holds a value of unknown type {kind}")


class GgufFile:
    """A GGUF container: ``metadata`` (key -> value), ``tensors`` (name -> TensorInfo). ModelLoadError if it is not sound."""

    def __init__(self, path: Path):
        self.path = path
        try:
            # Copy-on-write, because torch wants a writable array; nothing writes.
            self._data = np.memmap(path, dtype=np.uint8, mode="c")
        except FileNotFoundError:
            raise ModelLoadError(f"there is no file {path}") from None
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"cannot read {path}: {error}") from None
        cursor = _Cursor(path, self._data)
        if bytes(self._data[:4]) != b"GGUF":
            raise ModelLoadError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
        cursor.at = 4
        version = cursor.number("I")
        if version not in (2, 3):
            raise ModelLoadError(f"{path} is GGUF version {version}; versions 2 and 3 (little-endian) are supported")
        num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.number("I"))
        self.tensors = self._read_tensor_infos(cursor, num_tensors)

    def _read_tensor_infos(self, cursor: _Cursor, count: int) -> dict[str, TensorInfo]:
        path = self.path
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise ModelLoadError(f"{path} is damaged: its alignment {alignment!r} is not a small positive number")
        found = []
        for _ in range(count):
            name = cursor.string()
            num_dims = cursor.number("I")
            if num_dims > 4:
                raise ModelLoadError(f"{path} is damaged: tensor {name[:80]!r} has {num_dims} dimensions")
            dims = [cursor.number("Q") for _ in range(num_dims)]
            kind, offset = cursor.number("I"), cursor.number("Q")
            try:
                ggml_type = GGMLQuantizationType(kind)
            except ValueError:
                raise ModelLoadError(f"{path}: tensor {name[:80]!r} has the unknown type {kind}") from None
            found.append((name, ggml_type, tuple(reversed(dims)), offset))
        base = -(-cursor.at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, ggml_type, shape, offset in found:
            block, block_bytes = GGML_QUANT_SIZES[ggml_type]
            if math.prod(shape) > len(self._data) * 64 or (shape and shape[-1] % block):
                raise ModelLoadError(f"{path} is damaged: tensor {name[:80]!r} cannot have the shape {list(shape)}")
            info = TensorInfo(ggml_type, shape, base + offset, math.prod(shape) // block * block_bytes)
            if info.offset + info.nbytes > len(self._data):
                raise ModelLoadError(
                    f"{path} is truncated: tensor {name[:80]!r} needs {info.offset + info.nbytes:,} bytes, "
                    f"and the file has {len(self._data):,}"
                )
            if name in tensors:
                raise ModelLoadError(f"{path} is damaged: it holds two tensors named {name[:80]!r}")
            tensors[name] = info
        return tensors

    def read(self, name: str) -> torch.Tensor:
        """A tensor as fp32 (fp16 and bf16 as they are). KeyError if it is not there; ModelLoadError for an unread format."""
        info = self.tensors[name]
        if not is_supported(info.kind):
            raise ModelLoadError(f"{self.path}: tensor {name} is stored as {info.kind.name}, which is not supported")
        raw = torch.from_numpy(self._data[info.offset : info.offset + info.nbytes])
        return dequantise(raw, info.kind, info.shape)


_NAMES = {
    "attn_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "o_bias": "attn_output.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}
_TOP_NAMES = {"embed": "token_embd.weight", "final_norm": "output_norm.weight", "lm_head": "output.weight"}
ARCHITECTURES = ("llama", "qwen2", "qwen3")


def _stored_name(name: str) -> str:
    """The GGUF name of one of ``expected_shapes``' names."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _, layer, part = name.split(".")
    return f"blk.{layer}.{_NAMES[part]}"


class GgufSource:
    """A model in a GGUF file (a ``WeightSource``). ``fingerprint`` may be given when the file's hash is known already."""

    def __init__(self, path: Path, fingerprint: str | None = None):
        self.file = GgufFile(path)
        self.path = path
        self.config = read_config(self.file)
        self._shapes = expected_shapes(self.config)
        for name, shape in self._shapes.items():
            stored = _stored_name(name)
            info = self.file.tensors.get(stored)
            if info is None:
                raise ModelLoadError(f"{path} lacks the tensor {stored}")
            check_shape(path, stored, info.shape, shape)
            if not is_supported(info.kind):
                raise ModelLoadError(f"{path}: tensor {stored} is stored as {info.kind.name}, which is not supported")
        self.fingerprint = fingerprint or fingerprint_files([path])

    def tensor(self, name: str) -> torch.Tensor:
        """See ``WeightSource``."""
        return self.file.read(_stored_name(name))


def read_config(file: GgufFile) -> ModelConfig:
    """The decoder's configuration from a GGUF file's metadata. ModelLoadError if it is missing, odd or of another family."""
    path, metadata = file.path, file.metadata
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ModelLoadError(f"{path} holds a model of architecture {arch!r}; supported are {', '.join(ARCHITECTURES)}")

    def number(key: str, kind: type, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            what = "lacks" if value is None else f"has an unusable value {str(value)[:40]!r} for"
            raise ModelLoadError(f"{path} {what} the metadata key {arch}.{key}")
        return kind(value)

    if metadata.get(f"{arch}.expert_count"):
        raise ModelLoadError(f"{path} holds a mixture-of-experts model, which is not supported")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelLoadError(f"{path} lacks the tensor token_embd.weight")
    num_heads = number("attention.head_count", int)
    hidden_size = number("embedding_length", int)
    if not 1 <= num_heads <= hidden_size:
        raise ModelLoadError(f"{path} says {num_heads} attention heads for a hidden size of {hidden_size}")
    head_dim = number("attention.key_length", int, hidden_size // num_heads)
    value_length = number("attention.value_length", int, head_dim)
    rope_dims = number("rope.dimension_count", int, head_dim)
    if not head_dim == rope_dims == value_length:
        raise ModelLoadError(
            f"{path}: keys of {head_dim}, values of {value_length} and RoPE over {rope_dims} dimensions differ, "
            "which is not supported"
        )
    scaling = metadata.get(f"{arch}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ModelLoadError(f"{path} uses RoPE scaling {str(scaling)[:40]!r}; supported are none and linear")
    factors = None
    if "rope_freqs.weight" in file.tensors:
        factors = tuple(file.read("rope_freqs.weight").float().flatten().tolist())
        if not all(math.isfinite(f) and f > 0 for f in factors):
            raise ModelLoadError(f"{path} is damaged: rope_freqs.weight holds numbers that are not positive")
    rope = RopeConfig(
        theta=number("rope.freq_base", float, 10_000.0),
        scaling="linear" if scaling == "linear" else "default",
        factor=number("rope.scaling.factor", float, 1.0) if scaling == "linear" else 1.0,
        freq_factors=factors,
        interleaved=arch == "llama",
    )
    eos = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    return ModelConfig(
        architecture=arch,
        hidden_size=hidden_size,
        intermediate_size=number("feed_forward_length", int),
        num_layers=number("block_count", int),
        num_heads=num_heads,
        num_kv_heads=number("attention.head_count_kv", int, num_heads),
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        max_position_embeddings=number("context_length", int),
        rms_norm_eps=number("attention.layer_norm_rms_epsilon", float),
        rope=rope,
        tie_word_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        eos_token_ids=tuple(dict.fromkeys(i for i in eos if isinstance(i, int) and 0 <= i < embedding.shape[0])),
        bos_token_id=bos if isinstance(bos, int) else None,
    ).validate(str(path))
