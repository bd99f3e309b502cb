"""Chat templates: turns messages into the prompt text that a chat model was trained on. Used by tokenizer.py.

The same sandboxed Jinja environment, filters and variables that transformers' ``apply_chat_template`` offers, so that every
template on the hub renders to the same text here, without transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplateError(ValueError):
    """The messages do not fit the model's chat template (or it has none); the message says why, for the user."""


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks the assistant's part for training; here its content passes through."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> Any:
        """The nodes between the two tags."""
        lineno = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(lineno)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML characters, which a prompt must not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


class ChatTemplate:
    """One compiled template. ChatTemplateError if its text is no Jinja template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None):
        """``special_tokens``: what a template may name, such as ``bos_token`` and ``eos_token``."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ChatTemplateError(f"the model's chat template cannot be read: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt of ``messages`` (role, content, ...), ending where the assistant begins if asked. ChatTemplateError."""
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **variables},
            )
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template refuses the messages: {error}") from None
        except Exception as error:  # A template is a program of the model's author; its mistakes come as any exception.
            raise ChatTemplateError(f"the model's chat template fails on these messages: {error}") from None
