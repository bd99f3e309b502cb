"""What a hybrid simulation knows of its two workloads: latencies of batches and training speeds on every slice of a GPU, from
measurements, and predicted where nothing was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from actors.mig.geometry import GeometryError, gpu_geometry
from actors.mig.hybrid.layout import Work
from actors.mig.prediction import Measurement, PredictionError, predict
from apps.migperf.config import HybridConfig
from apps.migperf.measurements import read_table
from apps.program.errors import UserError

MOST_BATCH = 64
KINDS = ("1g", "2g", "3g", "4g", "7g")
"""Plain profiles: +me and double memory are 1g to these workloads."""


def make_work(config: HybridConfig, rows: Sequence[Measurement] | None = None) -> Work:
    """The two workloads on every plain profile of the GPU.

    Raises:
        UserError: no measurements, or none of a workload on this GPU.
    """
    if rows is None:
        if config.measurements is None:
            raise UserError(
                "The simulation needs latencies: give hybrid.measurements=FILE.csv (columns as for predict)."
            )
        rows = read_table(Path(config.measurements)).rows
    try:
        geometry = gpu_geometry(config.gpu)
        names = [profile.name for kind in KINDS for profile in geometry.profiles if profile.kind == kind]
        names = [name for name in names if "+" not in name]
        serve = _predicted(rows, config, "infer", config.serve, names, _batches(config), config.sequence)
        train = _predicted(rows, config, "train", config.train, names, (config.train_batch,), None)
    except (GeometryError, PredictionError) as error:
        raise UserError(str(error)) from error
    serve_ms = {}
    for name in names:
        table: list[float] = []
        for batch in _batches(config):
            latency, oom = serve[(name, batch)]
            # Half the limit is for the batch, half for waiting: the rule by which planners choose segments.
            if oom or (table and latency > config.latency_limit_ms / 2):
                break
            table.append(max([latency, *table[-1:]]))  # a larger batch is never faster
        if table and table[0] <= config.latency_limit_ms / 2:
            serve_ms[name] = tuple(table)
    trained = {name: config.train_batch / train[(name, config.train_batch)][0] * 1e3 for name in names
               if not train[(name, config.train_batch)][1]}  # fmt: skip
    if not serve_ms:
        raise UserError(f"No slice of {config.gpu} serves {config.serve} within {config.latency_limit_ms:g} ms.")
    if not trained:
        raise UserError(f"{config.train} with batch {config.train_batch} fits on no slice of {config.gpu}.")
    return Work(serve_ms, trained)


def _batches(config: HybridConfig) -> tuple[int, ...]:
    return tuple(range(1, MOST_BATCH + 1))


def _predicted(
    rows: Sequence[Measurement],
    config: HybridConfig,
    mode: str,
    workload: str,
    names: Sequence[str],
    batches: Sequence[int],
    sequence: int | None,
) -> dict[tuple[str, int], tuple[float, bool]]:
    """(latency in ms, out of memory) by (profile, batch): measured where it was, else predicted."""
    known = [row for row in rows if row.group == (config.gpu, mode, workload) and row.processes == 1]
    if not known:
        there = sorted({row.workload for row in rows if (row.gpu, row.mode) == (config.gpu, mode)})
        raise UserError(
            f"The measurements have no {workload!r} ({mode}) on {config.gpu}: they have {', '.join(there) or 'nothing'}."
        )
    if all(row.sequence is None for row in known):
        sequence = None
    asked = [
        Measurement(config.gpu, mode, workload, name, batch, sequence) for name in names for batch in batches
    ]  # fmt: skip
    measured = {
        replace(row, latency_ms=None, latency_std_ms=None, gract=None, fb_mib=None, oom=None): row for row in known
    }
    found = predict([*known, *asked])[len(known) :]
    result = {}
    for row, prediction in zip(asked, found, strict=True):
        exact = measured.get(row)
        if exact is not None and exact.oom:
            result[(row.profile, row.batch)] = (prediction.latency_ms, True)
        elif exact is not None and exact.latency_ms:
            result[(row.profile, row.batch)] = (exact.latency_ms, False)
        else:
            result[(row.profile, row.batch)] = (prediction.latency_ms, prediction.oom)
    return result
