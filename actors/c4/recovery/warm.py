"""What a warm worker process does when Ray starts it: the imports that a restart would otherwise wait for."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any

PRELOAD_VARIABLE = "SEXTANT_C4_PRELOAD"
BASE = (
    "torch", "torch._dynamo", "torch.distributed", "torch.nn.parallel", "ray.train", "ray.train.torch", "actors.c4.ray_train",
    "actors.c4.recorder.backend", "actors.c4.recorder.native",
)  # fmt: skip

logger = logging.getLogger(__name__)


def preload() -> None:
    """Ray's set-up hook of worker processes. A module that cannot be imported is left to whoever needs it.

    The imports run in a thread that only gets processor time which nobody else wants: they take seconds, next to a training
    whose steps must not suffer. numpy comes before, because its thread pool inherits how its maker is scheduled; so does the
    rehearsal come after.
    """
    _import("numpy")
    importing = threading.Thread(target=_import_idly, name="c4-preload", daemon=True)
    importing.start()
    importing.join()
    try:
        _rehearse()
    except Exception as error:  # a torch that lacks a part of this: nothing is lost but time
        logger.warning("A warm worker process could not rehearse a step: %s", error)


def _import_idly() -> None:
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or not allowed: at the usual priority then
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
    for name in os.environ.get(PRELOAD_VARIABLE, "").split(","):
        if name:
            _import(name)


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a module's body raises: the loop will show it to the user
        logger.warning("The module %s cannot be imported ahead of time: %s", name, error)


def _rehearse() -> None:
    """The first optimizer and the first backward of a process import seconds' worth of torch (its compiler); draws no numbers."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([weight])
    (weight * weight).sum().backward()
    optimizer.step()


def modules_of(loop: Callable[..., Any]) -> list[str]:
    """Modules that the loop will import when it is unpickled: its own, and those that its globals and closure name."""
    found: dict[str, None] = {}
    for value in [loop, *_named_values(loop)]:
        name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
        if isinstance(name, str) and name not in ("__main__", "builtins") and name in sys.modules:
            found[name] = None
    return list(found)


def preload_value(loop: Callable[..., Any], more: Iterable[str] = ()) -> str:
    """Value of ``PRELOAD_VARIABLE`` for a loop."""
    return ",".join(dict.fromkeys([*BASE, *modules_of(loop), *more]))


def _named_values(loop: Callable[..., Any]) -> list[Any]:
    function = getattr(loop, "__wrapped__", loop)
    code = getattr(function, "__code__", None)
    if code is None:
        return []
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= set(constant.co_names)
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:
            continue  # not yet filled
    return values
