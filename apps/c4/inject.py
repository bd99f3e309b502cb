"""The verb `inject`: a fault into a worker of a training that runs under C4, through the agent of its node."""

from __future__ import annotations

from typing import Annotated

import typer

from actors.c4.injection.faults import KINDS, Fault, FaultName, InjectionError
from apps.c4.attach import running_job
from apps.c4.config import C4Config
from apps.program.errors import UserError
from apps.program.report import print_table

INJECT_WAIT_S = 30.0


def inject(
    config: C4Config,
    fault: Annotated[str | None, typer.Option(help="What to inject; --list shows all.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Global rank of the worker; of a link, its sender.")] = None,
    peer: Annotated[int | None, typer.Option(min=0, help="Receiver of a link (default: the next of the ring).")] = None,
    factor: Annotated[
        float, typer.Option(min=1, help="How many times as long work takes, or a step over a slow link.")
    ] = 3.0,
    rate: Annotated[
        float | None, typer.Option(min=1, help="Bytes per second of a slow link, in place of --factor.")
    ] = None,
    duration: Annotated[float | None, typer.Option(min=0.01, help="Seconds; without, until the worker ends.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Bytes to which files may grow under disk_full.")] = 65536,
    run: Annotated[str | None, typer.Option(help="Name of the run; not needed when only one runs.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Show the faults and end.")] = False,
) -> None:
    """Inject a fault into a running training (started with fault injection enabled)."""
    if show:
        print_table(["fault", "what it does", "named as"], fault_rows(), "faults")
        return
    wanted = chosen(fault, rank, peer, factor, rate, duration, limit)
    with running_job(config.ray, run) as (name, master):
        import ray

        try:
            said = ray.get(master.inject.remote(wanted), timeout=INJECT_WAIT_S)
        except InjectionError as error:
            raise UserError(str(error)) from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InjectionError):
                raise UserError(str(error.cause)) from error
            raise
        except ray.exceptions.GetTimeoutError as error:
            raise UserError(f"The master of the run {name} did not answer within {INJECT_WAIT_S:g} s.") from error
    print(f"injected into {name}: {said}")


def chosen(
    fault: str | None,
    rank: int | None,
    peer: int | None,
    factor: float,
    rate: float | None,
    duration: float | None,
    limit: int,
) -> Fault:
    """The fault that the options describe; UserError with a sentence when they describe none."""
    names = ", ".join(name.value for name in FaultName)
    if fault is None:
        raise UserError(f"Say which fault: --fault with one of {names}.")
    if fault not in [name.value for name in FaultName]:
        raise UserError(f"There is no fault {fault!r}; there are {names}.")
    if rank is None:
        raise UserError("Say which worker: --rank with its global rank.")
    try:
        return Fault(FaultName(fault), rank, peer, factor, rate, duration, limit)
    except InjectionError as error:
        raise UserError(str(error)) from error


def fault_rows() -> list[list[str]]:
    """A row a fault: name, meaning, the kinds by which the diagnosis may name it."""
    return [
        [name.value, kind.meaning, ", ".join(one.value for one in kind.expected) or "no fault of the hardware"]
        for name, kind in KINDS.items()
    ]
