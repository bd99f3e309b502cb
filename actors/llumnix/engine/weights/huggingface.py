"""Hugging Face model folders: config.json and safetensors, single or sharded, of a Llama-family model. Opened by loading.py.

A hub name is downloaded (or found in the hub's cache) by ``find_folder`` first; everything else reads local files only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from actors.llumnix.engine.model_config import ModelConfig, ModelLoadError, RopeConfig
from actors.llumnix.engine.weights.source import check_shape, expected_shapes, fingerprint_files

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
TOKENIZER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_TOP_NAMES = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"}


def _stored_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _, layer, part = name.split(".")
    return f"model.layers.{layer}.{_NAMES[part]}"


def find_folder(name: str, weights: bool = True) -> Path:
    """The local folder of a hub model ``owner/name``, downloaded if need be; without ``weights`` the tokenizer's files only.

    ModelLoadError if the hub cannot be reached and the cache lacks the model, or the hub does not know it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [*TOKENIZER_FILES, *(["*.safetensors", "*.safetensors.index.json"] if weights else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError:
        raise ModelLoadError(
            f"model {name} is gated: accept its licence on the hub and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ModelLoadError(f"the Hugging Face hub knows no model {name} (or it is private)") from None
    except LocalEntryNotFoundError:
        raise ModelLoadError(
            f"model {name} is neither a local path nor in the hub's cache, and the Hugging Face hub cannot be reached"
        ) from None
    except Exception as error:  # The hub's client lets the errors of several HTTP libraries through.
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelLoadError(f"cannot fetch model {name} from the Hugging Face hub: {first}") from None


def read_json(path: Path, required: bool = True) -> dict[str, Any]:
    """A JSON object from a file; {} if it may be missing and is. ModelLoadError if it is missing, or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not required:
            return {}
        raise ModelLoadError(f"{path.parent} is no Hugging Face model folder: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"cannot read {path}: {str(error) or type(error).__name__}") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, and holds a {type(value).__name__}")
    return value


def token_ids(value: Any) -> tuple[int, ...]:
    """An ``eos_token_id`` entry (missing, a number, or a list of numbers) as a tuple."""
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0)


def read_eos_token_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """What ends a generation: generation_config.json's ids, else config.json's."""
    generation = read_json(folder / "generation_config.json", required=False)
    return tuple(dict.fromkeys(token_ids(generation.get("eos_token_id")) or token_ids(config.get("eos_token_id"))))


def _read_rope(path: Path, raw: dict[str, Any], number: Any) -> RopeConfig:
    """RoPE as Hugging Face writes it: ``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling``."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ModelLoadError(f"{path}: rope_scaling must be an object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ModelLoadError(f"{path} uses RoPE scaling {str(kind)[:40]!r}; supported are default, linear and llama3")
    if scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelLoadError(f"{path} rotates only a part of each head, which is not supported")
    theta = number("rope_theta", float, raw.get("rope_theta", 10_000.0), scaling)
    if kind == "default":
        return RopeConfig(theta)
    factor = number("factor", float, None, scaling)
    if kind == "linear":
        return RopeConfig(theta, "linear", factor)
    return RopeConfig(
        theta,
        "llama3",
        factor,
        number("low_freq_factor", float, None, scaling),
        number("high_freq_factor", float, None, scaling),
        number("original_max_position_embeddings", int, raw.get("max_position_embeddings"), scaling),
    )


def read_config(folder: Path) -> ModelConfig:
    """The decoder's configuration from config.json. ModelLoadError if it is missing, odd or of another family."""
    path = folder / "config.json"
    raw = read_json(path)
    architectures = raw.get("architectures") or []
    arch = architectures[0] if isinstance(architectures, list) and architectures else None
    if arch not in ARCHITECTURES:
        raise ModelLoadError(f"{path} names the architecture {arch!r}; supported are {', '.join(ARCHITECTURES)}")

    def number(key: str, kind: type, default: Any = None, where: dict[str, Any] | None = None) -> Any:
        value = (raw if where is None else where).get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            what = "lacks" if value is None else f"has an unusable value {str(value)[:40]!r} for"
            raise ModelLoadError(f"{path} {what} the key {key}")
        return kind(value)

    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelLoadError(f"{path} uses the activation {str(raw['hidden_act'])[:40]!r}; only silu is supported")
    if raw.get("mlp_bias"):
        raise ModelLoadError(f"{path} has biases in its MLP, which are not supported")
    if raw.get("quantization_config"):
        raise ModelLoadError(
            f"{path} describes pre-quantised weights, which are not supported: use the original model and dtype=int8"
        )
    num_heads, hidden_size = number("num_attention_heads", int), number("hidden_size", int)
    if not 1 <= num_heads <= hidden_size:
        raise ModelLoadError(f"{path} says {num_heads} attention heads for a hidden size of {hidden_size}")
    length = number("max_position_embeddings", int)
    if raw.get("sliding_window") and raw.get("use_sliding_window", arch == "MistralForCausalLM"):
        # Inside the window, sliding attention and full attention are the same.
        length = min(length, number("sliding_window", int))
    attention_bias = bool(raw.get("attention_bias"))
    bos = token_ids(raw.get("bos_token_id"))
    return ModelConfig(
        architecture=arch,
        hidden_size=hidden_size,
        intermediate_size=number("intermediate_size", int),
        num_layers=number("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=number("num_key_value_heads", int, num_heads),
        # A Qwen3 config that leaves head_dim out means 128, whatever hidden_size / num_heads is.
        head_dim=number("head_dim", int, 128 if arch == "Qwen3ForCausalLM" else hidden_size // num_heads),
        vocab_size=number("vocab_size", int),
        max_position_embeddings=length,
        rms_norm_eps=number("rms_norm_eps", float, 1e-6),
        rope=_read_rope(path, raw, number),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or arch == "Qwen2ForCausalLM",
        o_bias=attention_bias,
        qk_norm=arch == "Qwen3ForCausalLM",
        eos_token_ids=read_eos_token_ids(folder, raw),
        bos_token_id=bos[0] if bos else None,
    ).validate(str(path))


class HuggingFaceSource:
    """A model in a Hugging Face folder (a ``WeightSource``)."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ModelLoadError(f"there is no folder {folder}")
        self.path = folder
        self.config = read_config(folder)
        self._shapes = expected_shapes(self.config)
        self._open: dict[str, Any] = {}
        self._file_of = self._find_files()
        files = [folder / name for name in sorted(set(self._file_of.values()))]
        for name, shape in self._shapes.items():
            stored = _stored_name(name)
            if stored not in self._file_of:
                raise ModelLoadError(f"{folder} lacks the tensor {stored}")
            file = self._file(self._file_of[stored])
            try:
                found = tuple(file.get_slice(stored).get_shape())
            except SafetensorError as error:
                raise ModelLoadError(f"{folder / self._file_of[stored]} lacks the tensor {stored}: {error}") from None
            check_shape(folder / self._file_of[stored], stored, found, shape)
        self.fingerprint = fingerprint_files(files, (folder / "config.json").read_bytes())

    def _find_files(self) -> dict[str, str]:
        """Tensor name -> file name, from the index or from the only file."""
        index = self.path / "model.safetensors.index.json"
        single = self.path / "model.safetensors"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise ModelLoadError(f"{index} has no weight_map of tensor names to file names")
            strangers = [v for v in weight_map.values() if Path(v).name != v]
            if strangers:
                raise ModelLoadError(f"{index} points outside its folder: {strangers[0][:80]!r}")
            return weight_map
        if single.exists():
            return dict.fromkeys(self._file(single.name).keys(), single.name)
        raise ModelLoadError(f"{self.path} has no weights: neither model.safetensors nor model.safetensors.index.json")

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.path / name
            try:
                self._open[name] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise ModelLoadError(f"{path} is missing, though the index names it") from None
            except (SafetensorError, OSError, ValueError) as error:
                raise ModelLoadError(f"{path} is damaged or truncated: {error}") from None
        return self._open[name]

    def tensor(self, name: str) -> torch.Tensor:
        """See ``WeightSource``."""
        stored = _stored_name(name)
        value = self._file(self._file_of[stored]).get_tensor(stored)
        if not value.is_floating_point() or value.element_size() < 2:
            raise ModelLoadError(f"{self.path}: tensor {stored} is stored as {value.dtype}, which is not supported")
        return value
