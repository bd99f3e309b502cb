"""The one command-line scheme: ``python -m apps.<system> VERB [--config PRESET|FILE] [key=value ...] [--debug]``.

    app = program("llumnix", "Serve language models on migratable instances.")

    @app.verb
    def serve(config: LlumnixConfig, follow: Annotated[bool, typer.Option(help="...")] = True) -> None:
        '''Start the instances and the front door.'''

    if __name__ == "__main__":
        app.main()

A verb whose parameter is a configuration model gets ``--config`` and ``key=value`` and is called with the resolved
model; all else is typer's. A user's mistake ends in one line on stderr and a non-zero code (2 for usage and
configuration, 1 otherwise); Ctrl-C ends with 130.
"""

from __future__ import annotations

import functools
import inspect
import os
import select
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel
from typer.exceptions import Abort, TyperException

from actors.cluster.errors import ClusterError
from apps.program.config import load_config, presets
from apps.program.errors import ConfigError, UserError

__all__ = ["ConfigError", "Program", "UserError", "program"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
DEFAULT_PRESET = "cpu"


class Program:
    """One app's command line. Errors of ``user_errors`` (raised below apps, e.g. by the engine) are users' mistakes too."""

    def __init__(self, system: str, help: str, user_errors: Sequence[type[BaseException]] = ()):
        self.system = system
        self.user_errors: tuple[type[BaseException], ...] = (UserError, ClusterError, *user_errors)
        self.typer = typer.Typer(
            name=system,
            help=help,
            no_args_is_help=True,
            add_completion=False,
            pretty_exceptions_enable=False,
            rich_markup_mode=None,
            context_settings={"help_option_names": ["-h", "--help"]},
        )
        # One verb is still a verb: without a callback typer would drop its name.
        self.typer.callback()(_no_operation)

    def verb(self, function: _Function) -> _Function:
        """Registers ``function`` as the verb of its name (underscores become hyphens); its docstring is the help.

        At most one parameter may be annotated with a pydantic model; it receives the resolved configuration. With no
        ``--config``, the preset ``cpu`` of configs/<system> is read when there is one, else the model's defaults hold.
        """
        self.typer.command(name=function.__name__.replace("_", "-"))(self._with_config(function))
        return function

    def main(self, arguments: Sequence[str] | None = None) -> typing.NoReturn:
        """Runs the verb on the command line (or ``arguments``) and exits the process with its code."""
        sys.exit(self.run(sys.argv[1:] if arguments is None else arguments))

    def run(self, arguments: Sequence[str]) -> int:
        """Runs the verb; returns the exit code. Prints one line on stderr for a user's mistake."""
        arguments = list(arguments)
        debug = "--debug" in arguments or os.environ.get("SEXTANT_DEBUG", "") not in ("", "0")
        try:
            result = self.typer(
                [argument for argument in arguments if argument != "--debug"],
                prog_name=f"python -m apps.{self.system}",
                standalone_mode=False,
            )
            try:
                sys.stdout.flush()
            except BrokenPipeError as error:
                return self._pipe_broke(_PipeBroke(error), debug)
            return result if isinstance(result, int) else 0
        except (KeyboardInterrupt, Abort):
            print(file=sys.stderr)
            return 130
        except _PipeBroke as error:
            return self._pipe_broke(error, debug)
        except TyperException as error:
            return self._usage(error)
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        except BaseException as error:
            return self._failed(error, debug)

    def _pipe_broke(self, error: _PipeBroke, debug: bool) -> int:
        if not _reader_has_gone():
            return self._failed(error.broke, debug)
        # That is no mistake (head and less do so), but stdout must not be flushed again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0

    def _usage(self, error: TyperException) -> int:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message)
            return 2
        self._say(_one_line(message).rstrip(".") + f". See python -m apps.{self.system} --help.")
        return 2

    def _failed(self, error: BaseException, debug: bool) -> int:
        mistake = self._mistake_in(error)
        if mistake is None or debug:
            traceback.print_exception(error)
        if mistake is None:
            self._say(f"internal error: {type(error).__name__}: {_one_line(str(error))}")
            return 1
        self._say(_one_line(str(mistake)) or type(mistake).__name__)
        code = getattr(mistake, "exit_code", 1)
        return code if isinstance(code, int) else 1

    def _mistake_in(self, error: BaseException) -> BaseException | None:
        """The user's mistake in ``error``: itself, or what a Ray task or actor raised."""
        cause = getattr(error, "cause", None)  # of ray.exceptions.RayTaskError
        if isinstance(cause, self.user_errors):
            return cause
        return error if isinstance(error, self.user_errors) else None

    def _say(self, line: str) -> None:
        print(f"{self.system}: {line}", file=sys.stderr)

    def _with_config(self, function: Callable[..., Any]) -> Callable[..., Any]:
        hints = typing.get_type_hints(function, include_extras=True)
        signature = inspect.signature(function)
        models = [name for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, BaseModel)]
        models = [name for name in models if name in signature.parameters]
        parameters = [
            parameter.replace(annotation=hints.get(name, parameter.annotation), kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in signature.parameters.items()
            if name not in models
        ]
        if len(models) > 1:
            raise TypeError(f"verb {function.__name__} takes more than one configuration: {', '.join(models)}")
        if models:
            parameters += self._config_parameters()

        @functools.wraps(function)
        def command(**values: Any) -> Any:
            if models:
                overrides, path = values.pop("overrides") or [], values.pop("config_path")
                if path is None and DEFAULT_PRESET in presets(self.system):
                    path = DEFAULT_PRESET
                values[models[0]] = load_config(hints[models[0]], path, overrides, system=self.system)
            try:
                return function(**values)
            except BrokenPipeError as error:
                raise _PipeBroke(error) from error  # typer would end the process silently

        # typer reads the signature and the annotations of what it is given; both must describe the command line.
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del command.__wrapped__  # type: ignore[attr-defined]
        return command

    def _config_parameters(self) -> list[inspect.Parameter]:
        names = ", ".join(presets(self.system)) or "none"
        config = Annotated[
            str | None,
            typer.Option("--config", metavar="PRESET|FILE", help=f"A YAML file or the name of a preset ({names})."),
        ]
        overrides = Annotated[
            list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the file's.")
        ]
        kind = inspect.Parameter.KEYWORD_ONLY
        return [
            inspect.Parameter("config_path", kind, default=None, annotation=config),
            inspect.Parameter("overrides", kind, default=None, annotation=overrides),
        ]


def program(system: str, help: str, user_errors: Sequence[type[BaseException]] = ()) -> Program:
    """The command line of ``apps.<system>``."""
    return Program(system, help, user_errors)


class _PipeBroke(Exception):
    """Carries a BrokenPipeError past typer: of stdout, or of a connection that the verb used."""

    def __init__(self, broke: BrokenPipeError):
        super().__init__(str(broke))
        self.broke = broke


def _reader_has_gone() -> bool:
    """A pipe or socket as stdout whose other end is closed reports an error condition."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # no file behind stdout, or no poll on this system
        return False


def _no_operation() -> None:
    """Typer's group callback."""


def _one_line(text: str) -> str:
    return " ".join(text.split())
