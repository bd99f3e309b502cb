"""Reads a configuration model's own structure, to say in a sentence which key or value is wrong and what is allowed there."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

_UNKNOWN = {"extra_forbidden", "unexpected_keyword_argument"}
_MISSING = {"missing", "missing_argument", "missing_keyword_only_argument"}


def fields_of(section: Any) -> dict[str, Any]:
    """Key -> annotation of a section (pydantic model or dataclass); empty for anything else."""
    if isinstance(section, type) and issubclass(section, BaseModel):
        return {name: info.annotation for name, info in section.model_fields.items()}
    if dataclasses.is_dataclass(section) and isinstance(section, type):
        hints = typing.get_type_hints(section, include_extras=True)
        return {field.name: hints[field.name] for field in dataclasses.fields(section) if field.init}
    return {}


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, Annotated and type aliases unwrapped; [annotation] for a plain type."""
    origin = get_origin(annotation)
    if origin is typing.Annotated:
        return alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [one for member in get_args(annotation) for one in alternatives(member)]
    return [annotation]


def keys_of(model: Any, prefix: str = "") -> list[str]:
    """Every dotted key below ``model``, sections included."""
    keys: list[str] = []
    for name, annotation in fields_of(model).items():
        keys.append(prefix + name)
        for member in alternatives(annotation):
            keys.extend(keys_of(member, f"{prefix}{name}."))
    return keys


def describe_errors(model: type[BaseModel], problems: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(dotted key, sentence) of each pydantic problem, one per key."""
    found: dict[str, str] = {}
    for problem in problems:
        key, parents, wanted = _walk(model, problem["loc"])
        found.setdefault(key, _sentence(model, problem, key, parents, wanted))
    return list(found.items())


def _walk(model: type[BaseModel], loc: Sequence[str | int]) -> tuple[str, list[Any], list[Any]]:
    """Follows a pydantic location; returns the dotted key, the sections that hold it and the annotations it may have."""
    parents: list[Any] = [model]
    current: list[Any] = [model]
    path: list[str] = []
    for part in loc:
        step: list[Any] = []
        for one in current:
            fields = fields_of(one)
            origin, arguments = get_origin(one), get_args(one)
            if fields and part in fields:
                step.extend(alternatives(fields[str(part)]))
            elif origin is not None and isinstance(part, int) and arguments:
                step.extend(alternatives(arguments[0]))
            elif origin in (dict, Mapping) and len(arguments) == 2:
                step.extend(alternatives(arguments[1]))
        if not step and path and any(_tag(one) == part for one in current):
            current = [one for one in current if _tag(one) == part]  # pydantic names the union member it tried
            continue
        if not step and isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool", "none")):
            continue  # the name of a member of a union of plain types
        parents, current = current, step
        path.append(str(part))
    return ".".join(path), parents, current


def _tag(annotation: Any) -> str:
    return getattr(annotation, "__name__", str(annotation))


def _sentence(model: Any, problem: Mapping[str, Any], key: str, parents: list[Any], wanted: list[Any]) -> str:
    kind, context = problem["type"], problem.get("ctx") or {}
    section, _, name = key.rpartition(".")
    if kind in _UNKNOWN:
        allowed = sorted({field for parent in parents for field in fields_of(parent)})
        return f"{key} is not a key{_did_you_mean_key(model, key, name, allowed)} {_allowed_keys(section, allowed)}"
    if kind in _MISSING:
        return f"{key} must be given ({_wanted(wanted)})."
    value = _shown(problem.get("input"))
    options = _options(wanted)
    if options and kind in ("literal_error", "enum"):
        hint = _close(str(problem.get("input")), options)
        return f"{key} cannot be {value}{hint} Allowed: {', '.join(options)}."
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "value_error", "assertion_error"):
        reason = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        reason = reason.replace("Input should be", "it must be")
        is_section = any(fields_of(one) for one in wanted)
        at = "" if not key else f"{key}: " if is_section else f"{key} cannot be {value}: "
        return f"{at}{reason.rstrip('.')}."
    if key and any(fields_of(one) for one in wanted):
        allowed = sorted({field for one in wanted for field in fields_of(one)})
        return f"{key} is a section, not the value {value}. {_allowed_keys(key, allowed)}"
    detail = problem["msg"].replace("Input should be", "it must be").rstrip(".")
    if kind.endswith(("_type", "_parsing")) or context.get("class_name"):
        return f"{key} cannot be {value}: it must be {_wanted(wanted)}."
    return f"{key} cannot be {value}: {detail}."


def _allowed_keys(section: str, allowed: list[str]) -> str:
    where = f"in {section}" if section else "at the top"
    return f"Allowed {where}: {', '.join(allowed) or 'nothing'}."


def _did_you_mean_key(model: Any, key: str, name: str, allowed: list[str]) -> str:
    """The key of that very name in another section, else a similar one here, else a similar one anywhere."""
    everywhere = keys_of(model)
    near = [other for other in everywhere if other.rpartition(".")[2] == name]
    near = near or [key[: -len(name)] + one for one in difflib.get_close_matches(name, allowed, n=1)]
    if not near:
        leaves = {other.rpartition(".")[2]: other for other in everywhere}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(name, leaves, n=1, cutoff=0.75)]
    return f"; did you mean {near[0]}?" if near else "."


def _close(value: str, options: list[str]) -> str:
    near = difflib.get_close_matches(value.lower(), options, n=1)
    return f"; did you mean {near[0]}?" if near else "."


def _options(annotations: list[Any]) -> list[str]:
    options: list[str] = []
    for one in annotations:
        if get_origin(one) is Literal:
            options.extend("null" if value is None else str(value) for value in get_args(one))
        elif isinstance(one, type) and issubclass(one, enum.Enum):
            options.extend(str(member.value) for member in one)
        elif one is type(None):
            options.append("null")
    return options


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    dict: "a mapping",
}


def _wanted(annotations: list[Any]) -> str:
    words: list[str] = []
    for one in annotations:
        origin = get_origin(one)
        if one in _NAMES:
            words.append(_NAMES[one])
        elif origin is Literal:
            words.append("one of " + ", ".join(str(value) for value in get_args(one)))
        elif origin in (list, tuple, set, frozenset, Sequence):
            words.append("a list")
        elif origin is not None:
            words.append("a mapping")
        elif fields_of(one):
            words.append(f"a section with the keys {', '.join(fields_of(one))}")
        elif isinstance(one, type):
            words.append(f"a {one.__name__}")
    return " or ".join(dict.fromkeys(words)) or "another type"


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
