"""The configuration scheme: layers, strictness, and sentences that name the key."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, field_validator, model_validator

from actors.llumnix.engine.config import EngineConfig
from apps.program.config import Config, ConfigError, all_keys, dump_config, find_preset, load_config


@dataclass(frozen=True)
class Section:
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    threads: int = 1
    dtype: Literal["fp32", "bf16", "int8"] = "bf16"
    ratio: float = 0.5


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Inner(Config):
    depth: Annotated[int, Field(ge=1, le=10)] = 2
    path: Path | None = None


class Checked(Config):
    """Its validators look at several keys at once."""

    low: int = 0
    high: int = 1
    inner: Inner = Inner()

    @field_validator("inner")
    @classmethod
    def _path_needs_depth(cls, inner: Inner) -> Inner:
        if inner.path is not None and inner.depth < 2:
            raise ValueError("path needs a depth of at least 2")
        return inner

    @model_validator(mode="after")
    def _ordered(self) -> Checked:
        if self.low > self.high:
            raise ValueError("low must not be above high")
        return self


class Scheme(Config):
    section: Section = Section(dtype="int8")
    inner: Inner = Inner(depth=5)
    name: str = "x"
    sizes: tuple[int, ...] = (1, 2)
    weights: dict[str, float] = {}
    colour: Colour = Colour.RED
    enabled: bool = False
    others: list[Inner] = []

    @field_validator("name")
    @classmethod
    def _no_spaces(cls, value: str) -> str:
        if " " in value:
            raise ValueError("it must not contain spaces")
        return value


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_file_and_overrides_lie_over_one_another(tmp_path: Path) -> None:
    path = write(tmp_path, "section: {threads: 4}\nname: file\nsizes: [7]\ncolour: blue\n")
    config = load_config(Scheme, path, ["section.threads=8", "inner.path=/a/b", "weights={a: 1, b: 2.5}"])
    assert config.section == Section(threads=8, dtype="int8"), "a partial section keeps what its parent chose"
    assert config.inner == Inner(depth=5, path=Path("/a/b"))
    assert (config.name, config.sizes, config.colour) == ("file", (7,), Colour.BLUE)
    assert config.weights == {"a": 1.0, "b": 2.5}


def test_an_element_of_a_list_is_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, "others: [{depth: 3}, {depth: 4, path: a}]\nsizes: [1, 2, 3]\n")
    config = load_config(Scheme, path, ["others.1.depth=9", "sizes.0=7"])
    assert config.others == [Inner(depth=3), Inner(depth=9, path=Path("a"))]
    assert config.sizes == (7, 2, 3)


def test_no_file_gives_the_defaults() -> None:
    assert load_config(Scheme) == Scheme()


def test_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(Scheme, write(tmp_path, "# nothing\n")) == Scheme()


@pytest.mark.parametrize(
    ("override", "key", "parts"),
    [
        ("section.thread=2", "section.thread", ["did you mean section.threads?", "Allowed in section: dtype, ratio"]),
        ("threads=2", "threads", ["did you mean section.threads?", "Allowed at the top: colour, enabled"]),
        ("inner.zzz=2", "inner.zzz", ["is not a key. Allowed in inner: depth, path."]),
        ("section.threads=two", "section.threads", ["cannot be 'two'", "a whole number"]),
        ("section.threads=2.5", "section.threads", ["cannot be 2.5", "a whole number"]),
        ("section.threads='8'", "section.threads", ["cannot be '8'", "a whole number"]),
        ("section.threads=null", "section.threads", ["cannot be null"]),
        ("section.threads=true", "section.threads", ["cannot be true"]),
        ("enabled=1", "enabled", ["cannot be 1", "true or false"]),
        ("section.dtype=fp16", "section.dtype", ["cannot be 'fp16'", "Allowed: fp32, bf16, int8."]),
        ("section.dtype=int", "section.dtype", ["did you mean int8?"]),
        ("colour=blu", "colour", ["did you mean blue?", "Allowed: red, blue."]),
        ("section=3", "section", ["is a section, not the value 3", "Allowed in section: dtype"]),
        ("inner=[1]", "inner", ["is a section", "Allowed in inner: depth, path."]),
        ("inner.depth=11", "inner.depth", ["cannot be 11", "less than or equal to 10"]),
        ("sizes=5", "sizes", ["cannot be 5", "a list"]),
        ("sizes=[1,x]", "sizes.1", ["cannot be 'x'", "a whole number"]),
        ("others=[{dept: 1}]", "others.0.dept", ["did you mean others.0.depth?"]),
        ("weights={a: b}", "weights.a", ["cannot be 'b'", "a number"]),
        ("name=a b", "name", ["cannot be 'a b'", "must not contain spaces"]),
    ],
)
def test_a_mistake_is_named(override: str, key: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Scheme, None, [override])
    message = str(caught.value)
    assert caught.value.key == key
    assert message.startswith(f"On the command line: {key} ")
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_mistakes_of_several_keys_together() -> None:
    with pytest.raises(ConfigError, match=r"^On the command line: low must not be above high\.$"):
        load_config(Checked, None, ["low=2"])
    with pytest.raises(ConfigError, match=r": inner: path needs a depth of at least 2\.$"):
        load_config(Checked, None, ["inner.depth=1", "inner.path=/x"])


def test_several_mistakes_are_all_told(tmp_path: Path) -> None:
    path = write(tmp_path, "nam: a\nsection: {threads: x}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Scheme, path)
    assert f"In {path}: " in str(caught.value)
    assert "nam is not a key; did you mean name?" in str(caught.value)
    assert "section.threads cannot be 'x'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1", "not valid YAML at line"),
        ("- 1\n- 2\n", "must be a mapping"),
        ("hello", "must be a mapping"),
        ("name: a\nname: b\n", "not valid YAML"),
        ("name: ${oc.env:HOME}", "calls a resolver"),
        ("name: ${nothing.there}", "nothing.there"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=None) as caught:
        load_config(Scheme, write(tmp_path, text))
    assert part in str(caught.value)
    assert str(tmp_path / "config.yaml") in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(Scheme, path)


@pytest.mark.parametrize("override", ["name", "=3", "a b=3", "name=[1,", "section..threads=1"])
def test_malformed_override(override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load_config(Scheme, None, [override])


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load_config(Scheme, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(Scheme, tmp_path)


def test_preset_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "cpu.yaml").write_text("name: preset\n")
    (tmp_path / "demo" / "serve.yaml").write_text("applications: []\n")  # Ray Serve's own file
    monkeypatch.setattr("apps.program.config.CONFIG_ROOT", tmp_path)
    assert find_preset("cpu", "demo") == tmp_path / "demo" / "cpu.yaml"
    assert load_config(Scheme, "cpu", system="demo").name == "preset"
    for name in ("gpu", "serve", "../demo/cpu"):
        with pytest.raises(ConfigError, match=rf"no preset '{name}' for demo.*one of: cpu\.$|does not exist"):
            find_preset(name, "demo")


def test_another_key_may_be_referred_to(tmp_path: Path) -> None:
    path = write(tmp_path, "name: ${section.dtype}\n")
    assert load_config(Scheme, path, ["section.dtype=fp32"]).name == "fp32"


def test_text_that_looks_like_a_number_is_text_where_text_is_wanted() -> None:
    assert load_config(Scheme, None, ["name=0123"]).name == "0123"
    assert load_config(Scheme, None, ["name=1e5"]).name == "1e5"
    assert load_config(Scheme, None, ["name=true"]).name == "true"


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("2", 2.0), (".inf", float("inf"))])
def test_numbers(text: str, value: float) -> None:
    assert load_config(Scheme, None, [f"section.ratio={text}"]).section.ratio == value


def test_the_engine_is_a_section_of_a_configuration() -> None:
    class App(Config):
        engine: EngineConfig = EngineConfig()

    assert load_config(App, None, ["engine.threads=2"]).engine == EngineConfig(threads=2)
    with pytest.raises(ConfigError, match=r"engine\.thread is not a key; did you mean engine\.threads\?"):
        load_config(App, None, ["engine.thread=2"])
    assert "engine.max_num_seqs" in all_keys(App)


@given(
    threads=st.integers(-(2**40), 2**40),
    ratio=st.floats(allow_nan=False),
    name=st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs"])) | st.text(st.sampled_from("ab\\${}:.")),
    sizes=st.lists(st.integers(-(2**60), 2**60)).map(tuple),
    weights=st.dictionaries(st.text(st.sampled_from("abc${}:#'\"\\ -1\n")), st.floats(allow_nan=False)),
    colour=st.sampled_from(Colour),
)
def test_what_is_dumped_is_read_back(tmp_path_factory, threads, ratio, name, sizes, weights, colour) -> None:
    config = Scheme(
        section=Section(threads=threads, ratio=ratio), name=name, sizes=sizes, weights=weights, colour=colour
    )
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(Scheme, path) == config


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_override_breaks_the_loader(key: str, value: str) -> None:
    """Anything typed on the command line gives a configuration or a ConfigError."""
    try:
        load_config(Scheme, None, [f"{key}={value}"])
    except ConfigError as error:
        assert str(error)


KEYS = st.sampled_from(["section", "threads", "inner", "depth", "others", "sizes", "name", "x"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner), max_leaves=8)


@given(TREES)
def test_no_file_breaks_the_loader(tmp_path_factory, tree) -> None:
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    try:
        load_config(Scheme, path)
    except ConfigError as error:
        assert str(error)
