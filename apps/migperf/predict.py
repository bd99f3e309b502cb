"""The verb ``predict``: fills the rows of a table whose latency is ``?`` with what the others let one expect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actors.mig.prediction import PredictionError
from actors.mig.prediction import predict as predict_rows
from apps.migperf.measurements import MeasurementError, read_table, write_table

ADDED = ("predicted_ms", "low_ms", "high_ms", "predicted_oom")


def predict(
    measurements: Annotated[Path, typer.Option(help="CSV; rows whose latency_ms is '?' are predicted.")],
    out: Annotated[Path, typer.Option(help="CSV to write: the same rows with the predictions.")],
) -> None:
    """Predict latency (with a 90 % interval) and out-of-memory of slices that were not measured."""
    print(predict_file(measurements, out))


def predict_file(measurements: Path, out: Path) -> str:
    """Reads, predicts, writes; returns the line that says what was done.

    Every row gets predictions; those of measured rows are what the fitted law says of them.

    Raises:
        MeasurementError: what is wrong with the table, as one sentence.
    """
    table = read_table(measurements)
    if not any(table.asked):
        raise MeasurementError(
            f"No row of {measurements} asks for a prediction: write '?' as latency_ms where it is wanted."
        )
    wanted = {row.group for row, asks in zip(table.rows, table.asked, strict=True) if asks}
    told = {row.group for row in table.rows if row.latency_ms is not None}
    # A workload that ran out of memory everywhere and asks nothing is no obstacle to the others.
    chosen = [n for n, row in enumerate(table.rows) if row.group in wanted | told]
    try:
        found = dict(zip(chosen, predict_rows([table.rows[n] for n in chosen]), strict=True))
    except PredictionError as error:
        raise MeasurementError(str(error)) from error
    cells = []
    for number, cell in enumerate(table.cells):
        one = found.get(number)
        added = (
            ["", "", "", "1"]
            if one is None
            else [f"{value:.6g}" for value in (one.latency_ms, one.low_ms, one.high_ms)]
        )
        if one is not None:
            added.append(str(int(one.oom)))
        cells.append({**cell, **dict(zip(ADDED, added, strict=True))})
    columns = [*(name for name in table.columns if name not in ADDED), *ADDED]
    write_table(out, columns, cells)
    alarms = sum(found[n].oom for n, asks in enumerate(table.asked) if asks)
    count = sum(table.asked)
    return (
        f"Predicted {count} row{'s' if count > 1 else ''} of {len(wanted)} workload{'s' if len(wanted) > 1 else ''} "
        f"({alarms} expected to run out of memory): {out}"
    )
