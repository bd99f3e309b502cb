"""The OpenAI-compatible front door's data: request bodies (validated), and the error object every refusal is.

Fields and limits follow OpenAI's API reference for /v1/completions and /v1/chat/completions; extensions have vLLM's names
(top_k, min_p, repetition_penalty, ignore_eos, min_tokens, stop_token_ids, priority, ...). An unknown field is an error,
as it is at OpenAI, so that a misspelt parameter is never ignored. Responses are built in ``openai_responses``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_CHOICES = 64
MAX_LOGPROBS = 20
_MAX_INT = 2**53 - 1  # what JSON numbers carry exactly everywhere

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class ApiError(Exception):
    """A refusal or failure in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}`` and an HTTP status."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.kind, self.param, self.code = _sentence(message), status, kind, param, code

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted and ignored: OpenAI pads events against side channels; nothing is padded here."""


class _Body(BaseModel):
    """What both endpoints share. ``None`` means "not given" wherever OpenAI allows null."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-_MAX_INT, le=_MAX_INT)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    # vLLM's extensions
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_STRINGS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, le=_MAX_INT)
    include_stop_str_in_output: bool | None = None
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1)
    # Accepted so that common clients work; they change nothing here.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    logit_bias: dict[str, float] | None = None

    @field_validator("logit_bias")
    @classmethod
    def _no_logit_bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value:
            raise ValueError("logit_bias is not supported by this server")
        return value

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> _Body:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionBody(_Body):
    """POST /v1/completions."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: int | None = Field(None, ge=1, le=_MAX_INT)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    suffix: str | None = None

    @model_validator(mode="after")
    def _supported(self) -> CompletionBody:
        if self.suffix:
            raise ValueError("suffix is not supported by this server")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is only supported when it equals n")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo together with logprobs is not supported by this server")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one entry each (text or token ids)."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise ApiError("prompt is empty: at least one token is needed.", param="prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None

    def template_message(self) -> dict[str, str]:
        """Role and text as chat templates take them (``developer`` is ``system`` there)."""
        if self.content is None:
            text = ""
        elif isinstance(self.content, str):
            text = self.content
        else:
            text = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1, le=_MAX_INT)
    max_completion_tokens: int | None = Field(None, ge=1, le=_MAX_INT)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _supported(self) -> ChatBody:
        if self.tools:
            raise ValueError("tools are not supported by this server")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self

    def token_limit(self) -> int | None:
        """``max_completion_tokens``, or its older name."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


def validation_error(error: ValidationError) -> ApiError:
    """The most telling of a body's faults as one sentence that names the parameter."""
    faults = error.errors(include_url=False, include_input=False)
    field = faults[0]["loc"][:1]
    # A union reports a fault per alternative: one that got past the type is closer to what the user meant.
    rivals = [fault for fault in faults if fault["loc"][:1] == field]
    fault = next((f for f in rivals if not f["type"].endswith("_type")), max(rivals, key=lambda f: len(f["loc"])))
    kind, message = fault["type"], _sentence(fault["msg"].removeprefix("Value error, "))
    path = _path(fault["loc"])
    if kind == "json_invalid":
        return ApiError(f"The request body is not valid JSON: {message.removeprefix('Invalid JSON: ')}")
    if not path:
        return ApiError("The request body must be a JSON object." if kind.startswith("model_") else message)
    if kind == "extra_forbidden":
        return ApiError(f"Unrecognized request argument supplied: {path}.", param=path, code="unknown_parameter")
    if kind == "missing":
        return ApiError(f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")
    return ApiError(f"Invalid value for '{path}': {message}", param=path, code="invalid_value")


def _path(location: tuple[int | str, ...]) -> str:
    """A pydantic location as ``messages[0].content``; the names of a union's alternatives are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "TextPart"):
            path += f".{part}" if path else part
    return path


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."
