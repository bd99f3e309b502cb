"""Builds a tokenizer from a GGUF file's metadata: byte-level BPE ('gpt2') and sentencepiece BPE ('llama').

Used by tokenizer.py. The pre-tokenizers' patterns are those of the original models' tokenizer.json files and of llama.cpp's
llama-vocab.cpp, which names them by ``tokenizer.ggml.pre``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from actors.llumnix.engine.model_config import ModelLoadError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTROL, USER_DEFINED, UNUSED, BYTE = 3, 4, 5, 6
"""GGUF's token types (1 is a normal token, 2 the unknown one)."""


def _pre_tokenizer(path: Path, pre: str) -> Any:
    """The pre-tokenizer that ``tokenizer.ggml.pre`` names. ModelLoadError if it is unknown."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in ("default", "gpt-2"):
        return gpt2
    if pre in ("smollm", "starcoder", "refact", "command-r"):
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    patterns = {"llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "smaug-bpe": _LLAMA3, "qwen2": _QWEN2}
    if pre not in patterns:
        known = ", ".join(("default", "gpt-2", "smollm", *patterns))
        raise ModelLoadError(f"{path} names the pre-tokenizer {pre[:40]!r}; supported are {known}")
    split = pre_tokenizers.Split(Regex(patterns[pre]), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, byte_level])


def build_gguf_tokenizer(path: Path, metadata: dict[str, Any]) -> Tokenizer:
    """A ``tokenizers.Tokenizer`` equal to the one the model was trained with. ModelLoadError if the metadata is unfit."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama"):
        raise ModelLoadError(
            f"{path} has a tokenizer of kind {kind!r}; supported are 'gpt2' (BPE) and 'llama' (sentencepiece)"
        )
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise ModelLoadError(f"{path} has no tokens (tokenizer.ggml.tokens)")
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ModelLoadError(f"{path} is damaged: it has {len(tokens)} tokens and not as many token types")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        # Two ids of one text cannot both be produced; the later ones stay decodable under a name that no text contains.
        seen: set[str] = set()
        for i, token in enumerate(tokens):
            tokens[i] = f"{token}\0{i}" if token in seen else token
            seen.add(token)
        vocab = {token: i for i, token in enumerate(tokens)}
    try:
        build = _byte_level if kind == "gpt2" else _sentencepiece
        tokenizer = build(path, metadata, vocab)
        for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
            added = [
                AddedToken(token, special=special, normalized=False)
                for token, t in zip(tokens, types, strict=True)
                if t == wanted and token
            ]
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
        _add_bos_eos(path, metadata, tokens, kind, tokenizer)
    except ModelLoadError:
        raise
    except Exception as error:  # The library reports every mistake in a vocabulary as a bare Exception.
        raise ModelLoadError(f"{path} has an unusable tokenizer: {error}") from None
    return tokenizer


def _byte_level(path: Path, metadata: dict[str, Any], vocab: dict[str, int]) -> Tokenizer:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(m, str) and " " in m[1:] for m in merges):
        raise ModelLoadError(f"{path} has no usable BPE merges (tokenizer.ggml.merges)")
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    # The separating blank is never the first character: a token may be a blank's stand-in, but not empty.
    pairs = [(m[: m.index(" ", 1)], m[m.index(" ", 1) + 1 :]) for m in merges]
    # Llama 3 takes a whole word that is a token as it is, without asking the merges.
    ignore_merges = pre in ("llama-bpe", "llama3", "llama-v3")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, fuse_unk=False, ignore_merges=ignore_merges))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(path, pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(path: Path, metadata: dict[str, Any], vocab: dict[str, int]) -> Tokenizer:
    """Sentencepiece's BPE joins the two neighbours whose union scores best: merges ranked by the union's score."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocab):
        raise ModelLoadError(f"{path} has no usable token scores (tokenizer.ggml.scores)")
    merges: list[tuple[float, int, int, str, str]] = []
    for token, i in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                merges.append((-scores[i], vocab[left], vocab[right], left, right))
    merges.sort(key=lambda m: m[:3])
    unk = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    names = list(vocab)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for *_, left, right in merges],
            unk_token=names[unk] if isinstance(unk, int) and 0 <= unk < len(names) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    decode: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decode, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer


def _add_bos_eos(path: Path, metadata: dict[str, Any], tokens: list[str], kind: str, tokenizer: Tokenizer) -> None:
    """Begin-of-sequence and end-of-sequence tokens around an encoded text, where the model wants them."""
    pre = metadata.get("tokenizer.ggml.pre")
    add_bos = metadata.get(
        "tokenizer.ggml.add_bos_token", kind == "llama" or pre in ("llama-bpe", "llama3", "llama-v3")
    )
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    parts, special = ["$A"], []
    for name, wanted in (("bos", add_bos), ("eos", add_eos)):
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if not wanted:
            continue
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            raise ModelLoadError(f"{path} wants a {name} token around texts and does not say which")
        special.append((tokens[token_id], token_id))
        parts = [tokens[token_id], *parts] if name == "bos" else [*parts, tokens[token_id]]
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=" ".join(parts), special_tokens=special)
