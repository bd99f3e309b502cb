"""The command line: verbs with a configuration, one line for a mistake, exit codes, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import pytest
import typer

from apps.program.cli import Program, UserError, program
from apps.program.config import Config

REPOSITORY = Path(__file__).resolve().parents[3]


class Settings(Config):
    name: str = "default"
    count: int = 1


class EngineTrouble(Exception):
    """Stands for an exception of the floors below, which know no UserError."""


class TaskError(Exception):
    """Looks like ray.exceptions.RayTaskError: carries what the task raised."""

    def __init__(self, cause: BaseException):
        super().__init__("a traceback\nof many lines")
        self.cause = cause


@pytest.fixture
def app() -> Program:
    app = program("demo", "A demo.", user_errors=[EngineTrouble])

    @app.verb
    def show(config: Settings, times: Annotated[int, typer.Option(help="How often.")] = 1) -> None:
        """Show the settings."""
        for _ in range(times):
            print(f"{config.name} {config.count}")

    @app.verb
    def raise_it(what: str) -> None:
        errors = {
            "user": UserError("The port 80 is\nin use."),
            "engine": EngineTrouble("The file is no GGUF."),
            "task": TaskError(EngineTrouble("The file is truncated.")),
            "bug": ValueError("surprise"),
            "ctrl-c": KeyboardInterrupt(),
            "exit": SystemExit(7),
            "pipe": BrokenPipeError("the peer has gone"),
        }
        raise errors[what]

    return app


def test_a_verb_gets_its_configuration(app: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["show", "name=a", "--times", "2", "count=3"]) == 0
    assert capsys.readouterr().out == "a 3\na 3\n"


def test_a_file_is_read(app: Program, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("name: filed\ncount: 5\n")
    assert app.run(["show", "--config", str(path), "count=6"]) == 0
    assert capsys.readouterr().out == "filed 6\n"


def test_the_preset_cpu_is_the_default(
    app: Program, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "cpu.yaml").write_text("name: cpu-preset\n")
    (tmp_path / "demo" / "gpu.yaml").write_text("name: gpu-preset\n")
    monkeypatch.setattr("apps.program.config.CONFIG_ROOT", tmp_path)
    assert app.run(["show"]) == 0
    assert app.run(["show", "--config", "gpu"]) == 0
    assert capsys.readouterr().out == "cpu-preset 1\ngpu-preset 1\n"


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["show", "nam=a"], 2, "did you mean name?"),
        (["show", "count=x"], 2, "count cannot be 'x'"),
        (["show", "--config", "nowhere.yaml"], 2, "nowhere.yaml does not exist"),
        (["show", "--config"], 2, "--config"),
        (["show", "--times", "x"], 2, "--times"),
        (["shwo"], 2, "Did you mean 'show'?"),
        (["show", "--nope"], 2, "No such option: --nope"),
        (["raise-it", "user"], 1, "The port 80 is in use."),
        (["raise-it", "engine"], 1, "The file is no GGUF."),
        (["raise-it", "task"], 1, "The file is truncated."),
    ],
)
def test_a_users_mistake_is_one_line(
    app: Program, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, part: str
) -> None:
    assert app.run(arguments) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("demo: ")
    assert part in printed.err


def test_debug_shows_the_traceback(app: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["raise-it", "user", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(app: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["raise-it", "bug"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.endswith("demo: internal error: ValueError: surprise\n")


def test_a_connection_that_breaks_is_not_taken_for_a_reader_that_left(
    app: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["raise-it", "pipe"]) == 1
    assert "BrokenPipeError: the peer has gone" in capsys.readouterr().err


def test_exit_codes(app: Program) -> None:
    assert app.run(["raise-it", "ctrl-c"]) == 130
    assert app.run(["raise-it", "exit"]) == 7


def test_help_names_verbs_and_settings(app: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["--help"]) == 0
    assert "show" in capsys.readouterr().out
    assert app.run(["show", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--config" in printed
    assert "KEY=VALUE" in printed
    assert app.run([]) == 2


SCRIPT = """
import sys, time
from apps.program.cli import program, UserError
app = program("demo", "A demo.")
@app.verb
def wait() -> None:
    print("ready", flush=True)
    time.sleep(60)
@app.verb
def fail() -> None:
    raise UserError("No.")
@app.verb
def flood() -> None:
    for _ in range(100000):
        print("line")
app.main()
"""


def start(verb: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", SCRIPT, verb]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_process_ends_on_ctrl_c_without_a_traceback() -> None:
    process = start("wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_a_process_fails_with_its_code() -> None:
    process = start("fail")
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (1, "demo: No.\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = start("flood")
    assert process.stdout is not None
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
