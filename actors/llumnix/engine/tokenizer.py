"""Text to token ids and back, and chat messages to a prompt: one class for GGUF files and Hugging Face folders.

The ingress holds one to encode prompts; every engine holds one for the bytes of its output tokens. Needs no weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from actors.llumnix.engine.chat_template import ChatTemplate, ChatTemplateError
from actors.llumnix.engine.model_config import ModelLoadError
from actors.llumnix.engine.weights.gguf_tokenizer import build_gguf_tokenizer
from actors.llumnix.engine.weights.huggingface import read_eos_token_ids, read_json

__all__ = ["ChatTemplateError", "Tokenizer", "TokenizerError"]


class TokenizerError(ValueError):
    """A text cannot be encoded; the message says why, for the user."""


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's stand-in character -> byte: printable Latin-1 stands for itself, the other bytes for U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


class Tokenizer:
    """A tokenizer with the model's special tokens and chat template. Safe to use from several threads."""

    def __init__(
        self,
        fast: FastTokenizer,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        """``special_tokens``: ``bos_token``, ``eos_token``, ... as the chat template names them."""
        fast.no_truncation()
        fast.no_padding()
        self._fast = fast
        self.special_tokens = dict(special_tokens or {})
        self.eos_token_ids: tuple[int, ...] = tuple(eos_token_ids)
        bos = self.special_tokens.get("bos_token")
        self.bos_token_id: int | None = None if bos is None else fast.token_to_id(bos)
        self._chat_template = None if chat_template is None else ChatTemplate(chat_template, self.special_tokens)
        added = fast.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._literal = {i: token.content.encode() for i, token in added.items() if not token.special}
        decoder = str(fast.decoder)
        self._byte_level = "ByteLevel" in decoder
        self._sentencepiece = "ByteFallback" in decoder or "Metaspace" in decoder
        self.vocab_size: int = max(fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def save(self, folder: Path) -> None:
        """Writes it into a model folder, from which ``tokenizer_from_folder`` reads the same one."""
        self._fast.save(str(folder / "tokenizer.json"))
        settings: dict[str, str] = dict(self.special_tokens)
        if self._chat_template is not None:
            settings["chat_template"] = self._chat_template.source
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        eos = {"eos_token_id": list(self.eos_token_ids)}
        (folder / "generation_config.json").write_text(json.dumps(eos) + "\n", encoding="utf-8")

    @property
    def has_chat_template(self) -> bool:
        """Whether ``apply_chat_template`` can work."""
        return self._chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with ``add_special_tokens`` those that the model wants around it too. TokenizerError."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise TokenizerError("the text holds half of a surrogate pair, which is no character") from None
        return self._fast.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the ids, special tokens left out, bytes that are not UTF-8 as U+FFFD."""
        return self._fast.decode(list(token_ids), skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that a token adds to the output; b'' for special tokens and ids outside the vocabulary."""
        if token_id in self._special_ids or token_id < 0:
            return b""
        if token_id in self._literal:
            return self._literal[token_id]
        piece = self._fast.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            if all(c in _BYTE_OF for c in piece):
                return bytes([_BYTE_OF[c] for c in piece])
            return piece.encode()
        if self._sentencepiece:
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace("▁", " ").encode()
        return self._fast.decode([token_id]).encode()

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text of chat messages. ChatTemplateError if the template refuses them or the model has none."""
        if self._chat_template is None:
            raise ChatTemplateError("this model has no chat template: use completions instead of chat")
        return self._chat_template.render(messages, add_generation_prompt, **variables)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The prompt's token ids of chat messages. ChatTemplateError, TokenizerError."""
        # The template writes the special tokens itself.
        return self.encode(self.render_chat(messages, add_generation_prompt, **variables), add_special_tokens=False)


def tokenizer_from_gguf(path: Path, metadata: dict[str, Any], eos_token_ids: Sequence[int]) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata. ModelLoadError."""
    fast = build_gguf_tokenizer(path, metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            special[f"{name}_token"] = tokens[token_id]
    template = metadata.get("tokenizer.chat_template")
    return _make(path, fast, eos_token_ids, template if isinstance(template, str) else None, special)


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json, tokenizer_config.json, chat_template.jinja. ModelLoadError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelLoadError(f"{folder} has no tokenizer.json")
    try:
        fast = FastTokenizer.from_file(str(path))
    except Exception as error:  # The library reports a bad file as a bare Exception.
        raise ModelLoadError(f"cannot read {path}: {error}") from None
    settings = read_json(folder / "tokenizer_config.json", required=False)
    special = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special[name] = value
    template = settings.get("chat_template")
    if isinstance(template, list):  # Several named ones; [{"name": "default", "template": ...}, ...]
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"cannot read {file}: {error}") from None
    eos = read_eos_token_ids(folder, read_json(folder / "config.json", required=False))
    if not eos and "eos_token" in special:
        found = fast.token_to_id(special["eos_token"])
        eos = () if found is None else (found,)
    return _make(folder, fast, eos, template if isinstance(template, str) else None, special)


def _make(
    path: Path, fast: FastTokenizer, eos: Sequence[int], template: str | None, special: dict[str, str]
) -> Tokenizer:
    try:
        return Tokenizer(fast, eos, template, special)
    except ChatTemplateError as error:
        raise ModelLoadError(f"{path}: {error}") from None
