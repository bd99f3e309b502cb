"""The one configuration scheme: a typed model, read from YAML, overridden as ``key=value`` on the command line.

An app states its scheme as a pydantic model (derived from ``Config``; nested models and stdlib dataclasses are sections).
``load_config`` starts from the model's defaults, lays the YAML file over them, then the overrides, and validates the sum
strictly: an unknown key or a wrong type is a ``ConfigError`` that names the dotted key and what is allowed there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from apps.program.errors import ConfigError
from apps.program.scheme import describe_errors, keys_of

__all__ = ["Config", "ConfigError", "dump_config", "find_preset", "load_config", "presets"]

CONFIG_ROOT = Path(__file__).resolve().parents[2] / "configs"
_RESOLVER = re.compile(r"(?<!\\)(?:\\\\)*\$\{[^}]*:")

ModelT = TypeVar("ModelT", bound=BaseModel)


class Config(BaseModel):
    """Base of every app's configuration: frozen, unknown keys forbidden, defaults validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


def presets(system: str) -> list[str]:
    """Names of the presets in ``configs/<system>``, sorted (``serve.yaml`` there is Ray Serve's own file, no preset)."""
    return sorted(path.stem for path in (CONFIG_ROOT / system).glob("*.yaml") if path.stem != "serve")


def find_preset(name_or_path: str | Path, system: str | None = None) -> Path:
    """The YAML file meant by ``--config``: a path (has a separator or a .yaml ending), or the name of a preset.

    Raises:
        ConfigError: neither a file nor a preset; lists the presets.
    """
    text = str(name_or_path)
    looks_like_path = isinstance(name_or_path, Path) or "/" in text or text.endswith((".yaml", ".yml"))
    if not looks_like_path and system is not None:
        if text in presets(system):
            return CONFIG_ROOT / system / f"{text}.yaml"
        names = ", ".join(presets(system)) or "none"
        raise ConfigError(f"There is no preset {text!r} for {system}: give a path to a YAML file or one of: {names}.")
    path = Path(text).expanduser()
    if path.is_dir():
        raise ConfigError(f"The configuration {path} is a folder, not a YAML file.")
    if not path.is_file():
        hint = f" (presets of {system}: {', '.join(presets(system))})" if system and presets(system) else ""
        raise ConfigError(f"The configuration file {path} does not exist{hint}.")
    return path


def load_config(
    model: type[ModelT],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    system: str | None = None,
) -> ModelT:
    """Defaults of ``model``, then the YAML file, then ``key=value`` overrides, validated.

    Args:
        model: the scheme.
        path: a YAML file, or a preset's name when ``system`` is given; None for the model's defaults alone.
        overrides: ``section.key=value``; the value is read as YAML (``[1, 2]``, ``null``, ``1e-3``, ``text``).
        system: folder below ``configs/`` in which preset names are looked up.

    Raises:
        ConfigError: with one sentence; ``key`` names the place.
    """
    file = find_preset(path, system) if path is not None else None
    origin = f"In {file}" if file is not None else "On the command line"
    tree: dict[str, Any] = _defaults(model)
    raw: dict[str, str] = {}
    try:
        if file is not None:
            from_file = _read(file)
            _reject_resolvers(from_file, origin)
            tree = _merge(tree, from_file)
        for item in overrides:
            key, text = _split_override(item)
            _reject_resolvers(text, f"In the override {item!r}")
            tree = _merge(tree, _nest(tree, key.split("."), _value_of(item, text)))
            raw[key] = text
        resolved: Any = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}: {_first_line(error)}.") from error
    return _validate(model, resolved, origin, raw)


def dump_config(config: BaseModel) -> str:
    """YAML text from which ``load_config`` makes an equal model."""
    data = _escape(config.model_dump(mode="json"))
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def _validate(model: type[ModelT], data: dict[str, Any], origin: str, raw: Mapping[str, str]) -> ModelT:
    try:
        return _parse(model, data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    # An override such as name=123 was meant as the text it was typed as: where a string is wanted, give it that.
    wants_text = [_plain(problem["loc"]) for problem in problems if problem["type"] == "string_type"]
    for key in wants_text:
        if key in raw and "${" not in raw[key]:
            _set(data, key, raw[key])
    try:
        return _parse(model, data)
    except ValidationError as error:
        found = describe_errors(model, error.errors(include_url=False))
        if any(found[0][0] == key or found[0][0].startswith(f"{key}.") for key in raw):
            origin = "On the command line"
        more = f" ({len(found) - 3} more like these.)" if len(found) > 3 else ""
        sentences = " ".join(sentence for _, sentence in found[:3])
        raise ConfigError(f"{origin}: {sentences}{more}", found[0][0] if len(found) == 1 else None) from error


def _parse(model: type[ModelT], data: dict[str, Any]) -> ModelT:
    """Strict validation in JSON mode: lists become tuples and strings paths, but "8" is no integer and 1 no bool."""
    return model.model_validate_json(json.dumps(data, default=str), strict=True)


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    """The defaults of all keys that have one, so that a partial section keeps what its parent chose for the rest."""
    values: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        default = info.get_default(call_default_factory=True, validated_data={})
        if default is not PydanticUndefined:
            adapter = TypeAdapter(info.annotation if info.annotation is not None else Any)
            values[name] = _escape(adapter.dump_python(default, mode="json", warnings=False))
    return values


def _merge(base: Any, over: Any) -> Any:
    """``over`` laid over ``base``: mappings key by key, anything else replaced whole."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    return base | {key: _merge(base.get(key), value) for key, value in over.items()}


def _nest(tree: Any, path: list[str], value: Any) -> Any:
    """The mapping {path[0]: {path[1]: ... value}}; where ``tree`` has a list, a copy of it with that element changed."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(tree, list) and head.isdigit() and int(head) < len(tree):
        index = int(head)
        return [_merge(old, _nest(old, rest, value)) if at == index else old for at, old in enumerate(tree)]
    below = tree.get(head) if isinstance(tree, dict) else None
    return {head: _nest(below, rest, value)}


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"The configuration file {file} is not UTF-8 text.") from error
    except OSError as error:
        raise ConfigError(f"The configuration file {file} cannot be read: {error.strerror}.") from error
    try:
        plain = yaml.safe_load(text)
        if plain is not None and not isinstance(plain, dict):
            raise ConfigError(f"The configuration file {file} must be a mapping of keys to values.")
        # OmegaConf reads it again: it knows 1e-3 as a number and refuses a key that stands twice.
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False) if plain else {}  # type: ignore[return-value]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it does not parse"
        raise ConfigError(f"The configuration file {file} is not valid YAML{where}: {problem}.") from error


def _split_override(item: str) -> tuple[str, str]:
    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"The override {item!r} is not of the form key=value.")
    if not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", key):
        raise ConfigError(f"The override {item!r} has no valid key: write section.key=value.", key)
    return key, text


def _value_of(item: str, text: str) -> Any:
    if "${" in text:
        return text  # an interpolation is a string until it is resolved
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"The value of the override {item!r} is not valid YAML; quote it if it is text.") from error


def _reject_resolvers(value: Any, origin: str) -> None:
    """``${other.key}`` is allowed, ``${resolver:...}`` (environment variables, eval-like functions) is not."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _reject_resolvers(item, origin)
    elif isinstance(value, str) and (found := _RESOLVER.search(value)):
        raise ConfigError(
            f"{origin}: {found.group(0)!r}... calls a resolver; only ${{other.key}} may stand in a configuration."
        )


def _escape(value: Any) -> Any:
    """Literal ``${`` in values is escaped (and backslashes before it), so that reading it back does not interpolate."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escape(item) for item in value]
    return value


def _plain(loc: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in loc)


def _set(data: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        data = data[int(part)] if isinstance(data, list) else data[part]
    if isinstance(data, list):
        data[int(last)] = value
    else:
        data[last] = value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def all_keys(model: type[BaseModel]) -> list[str]:
    """Every dotted key of the scheme, sections included; for help texts."""
    return keys_of(model)
