"""What the verb `sparsify` does: a model of the serving engine pruned, recovered, packed into a folder, measured from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from actors.llumnix.engine.loading import ModelLoadError, load_tokenizer, open_weights, read_model_config
from actors.llumnix.engine.tokenizer import Tokenizer
from apps.balanced_sparsity.config import BalancedSparsityConfig, SparsifyConfig
from apps.balanced_sparsity.data.text import docstrings
from apps.balanced_sparsity.pruning.patterns import Pattern
from apps.balanced_sparsity.serving.checkpoint import CheckpointSize, save_checkpoint
from apps.balanced_sparsity.serving.llama import Llama
from apps.balanced_sparsity.serving.sparsify import Recovery, sparsify_
from apps.balanced_sparsity.training.loop import pattern_of
from apps.program.errors import UserError

CHARACTERS_PER_TOKEN = 8
"""Of which a stretch of text is read; no tokenizer needs so many of a text in Latin letters."""
EMBEDDED_TEXT = "docstrings of Python's library"


@dataclass(frozen=True)
class Texts:
    """Token ids, int64 [sequences, tokens], to prune and recover on and only to measure on; and where they are from."""

    calibration: torch.Tensor
    test: torch.Tensor
    calibration_name: str
    test_name: str


@dataclass(frozen=True)
class SparseModel:
    """What `sparsify` made."""

    model: str
    folder: str
    pattern: str
    sparsity: float
    """Share of zeros in the matrices that were pruned."""
    value_type: str
    matrices: int
    size: CheckpointSize
    dense_perplexity: float
    perplexity: float
    """Of the folder, read again: pruned, recovered, its values rounded to ``value_type``."""
    calibration_text: str
    calibration_tokens: int
    test_text: str
    test_tokens: int
    last_layer_error: float
    """Relative error of the last layer's outputs after pruning, before distillation."""
    seconds: float

    def rows(self) -> list[list[str]]:
        """The table that is printed: what, dense, sparse."""
        size, mb = self.size, 1e6
        dense_total = size.dense_bytes + size.other_bytes
        return [
            ["zeros in the pruned matrices", "0 %", f"{100 * self.sparsity:.1f} %"],
            ["pruned matrices", f"{size.dense_bytes / mb:.2f} MB", f"{size.matrix_bytes / mb:.2f} MB"],
            ["  without padding", "", f"{size.ideal_bytes / mb:.2f} MB"],
            ["all weights", f"{dense_total / mb:.2f} MB", f"{(size.matrix_bytes + size.other_bytes) / mb:.2f} MB"],
            ["file", "", f"{size.file_bytes / mb:.2f} MB"],
            ["perplexity", f"{self.dense_perplexity:.3f}", f"{self.perplexity:.3f}"],
            ["perplexity, sparse / dense", "", f"{self.perplexity / self.dense_perplexity:.3f}"],
        ]


def make_sparse(config: BalancedSparsityConfig, model: str, out: Path, told: Callable[[str], None]) -> SparseModel:
    """Prunes ``model`` (named as in the engine's configuration) into the folder ``out``, which the engine loads.

    Args:
        told: is called with a line for each step of the work.

    Raises:
        UserError: no such model, a pattern or sparsity that there is not, too little text, a folder that is not empty.
    """
    began = time.monotonic()
    settings, sparsity = config.sparsify, config.pruning.sparsity
    pattern = check_pattern(config)
    _check_out(out)
    dense, tokenizer = _load(model, settings)
    if set(range(len(dense.layers))) <= set(settings.skip_layers):
        raise UserError("sparsify.skip_layers skips every layer: nothing is left to prune.")
    texts = read_texts(settings, tokenizer)
    told(f"Text: {texts.calibration_name}, {texts.calibration.numel()} tokens; measured on {texts.test_name}.")
    dense_perplexity = perplexity(dense, texts.test)
    told(f"Dense: perplexity {dense_perplexity:.3f}.")
    try:
        pruned = sparsify_(
            dense, texts.calibration, pattern, sparsity, method=settings.method, recovery=_recovery(settings),
            skip_layers=settings.skip_layers, told=lambda line: told(f"  {line}"),
        )  # fmt: skip
    except ValueError as error:  # layers that there are not; pattern, sparsity and text were checked before
        raise UserError(f"The model cannot be pruned: {error}.") from error
    told(f"Writing {out} ...")
    try:
        size = save_checkpoint(
            out, dense, pruned.masks, pattern.columns, value_type=settings.value_type, vector=pattern.rows,
            other_type=torch.float32 if settings.value_type == "fp32" else torch.bfloat16, tokenizer=tokenizer,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"{out} could not be written: {error.strerror or error}.") from error
    again = Llama.from_source(open_weights(str(out)), settings.tokens)
    kept = sum(int(mask.sum()) for mask in pruned.masks.values())
    return SparseModel(
        model=model,
        folder=str(out),
        pattern=str(pattern),
        sparsity=1 - kept / sum(mask.numel() for mask in pruned.masks.values()),
        value_type=settings.value_type,
        matrices=len(pruned.masks),
        size=size,
        dense_perplexity=dense_perplexity,
        perplexity=perplexity(again, texts.test),
        calibration_text=texts.calibration_name,
        calibration_tokens=texts.calibration.numel(),
        test_text=texts.test_name,
        test_tokens=texts.test.numel(),
        last_layer_error=pruned.layer_errors[-1],
        seconds=time.monotonic() - began,
    )


def check_pattern(config: BalancedSparsityConfig) -> Pattern:
    """The configured pattern. Raises UserError for one that cannot be packed, or that cannot be so sparse."""
    pattern = pattern_of(config)
    if pattern.kind not in ("balanced", "2:4"):
        raise UserError(f"pruning.pattern: only balanced patterns and 2:4 can be packed and served, not {pattern}.")
    try:
        pattern.check(config.pruning.sparsity)
    except ValueError as error:
        raise UserError(f"pruning.sparsity: {error}.") from error
    return pattern


def read_texts(settings: SparsifyConfig, tokenizer: Tokenizer) -> Texts:
    """Calibration and test text; without a test text the last tenth of the calibration text is held out for it.

    Raises:
        UserError: a file that is not there or no text, or too little of it.
    """
    text, name = (docstrings(), EMBEDDED_TEXT) if settings.text is None else _read(settings.text, "sparsify.text")
    if settings.test is None:
        cut = len(text) - len(text) // 10
        text, test, test_name = text[:cut], text[cut:], f"the last tenth of {name}"
    else:
        test, test_name = _read(settings.test, "sparsify.test")
    return Texts(
        _sequences(text, settings.sequences, settings.tokens, tokenizer, f"The calibration text ({name})"),
        _sequences(test, settings.test_sequences, settings.tokens, tokenizer, f"The text to measure on ({test_name})"),
        name,
        test_name,
    )


@torch.no_grad()
def perplexity(model: Llama, token_ids: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of a sequence's tokens but the first, each given those before it in its sequence.

    Args:
        token_ids: int64 [sequences, tokens].
    """
    total = 0.0
    for sequence in token_ids:
        logits = model(sequence[None, :-1])[0]
        total += float(F.cross_entropy(logits.double(), sequence[1:], reduction="sum"))
    return math.exp(min(total / (token_ids.numel() - len(token_ids)), 700.0))  # e^710 is above the largest float64


def _load(name: str, settings: SparsifyConfig) -> tuple[Llama, Tokenizer]:
    try:
        longest = read_model_config(name).max_position_embeddings
        if settings.tokens > longest:
            raise UserError(f"sparsify.tokens is {settings.tokens}, and {name} takes at most {longest} tokens.")
        return Llama.from_source(open_weights(name), settings.tokens), load_tokenizer(name)
    except ModelLoadError as error:
        raise UserError(f"The model cannot be used: {error}.") from error


def _recovery(settings: SparsifyConfig) -> Recovery:
    return Recovery(
        settings.reconstruct,
        settings.steps,
        min(settings.batch, settings.sequences),
        settings.learning_rate,
        settings.seed,
    )


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a new folder with --out.")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: name a new folder with --out.")


def _read(path: str, key: str) -> tuple[str, str]:
    file = Path(path).expanduser()
    try:
        return file.read_text(encoding="utf-8", errors="replace"), file.name
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read as a text file: {error.strerror or error}.") from error


def _sequences(text: str, count: int, tokens: int, tokenizer: Tokenizer, what: str) -> torch.Tensor:
    """The beginnings of stretches of equal length, so that they are of all of the text: [at most count, tokens]."""
    stretches = max(1, min(count, len(text) // (CHARACTERS_PER_TOKEN * tokens)))
    length = len(text) // stretches
    found = []
    for number in range(stretches):
        begin = number * length
        ids = tokenizer.encode(text[begin : begin + min(length, CHARACTERS_PER_TOKEN * tokens)])[:tokens]
        if len(ids) == tokens:
            found.append(ids)
    if not found:
        raise UserError(
            f"{what} is too short for a sequence of {tokens} tokens ({len(text)} characters): name more text or lower "
            "sparsify.tokens."
        )
    return torch.tensor(found)
