"""Where a sweep keeps what it has: one line a trial, appended as it ends, so that a sweep that was cut off goes on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from apps.migperf.measurements import write_table
from apps.migperf.sweep.trial import CSV_COLUMNS, TrialResult, from_json, measurement_cells, to_json
from apps.program.errors import UserError

LINES = "trials.jsonl"
TABLE = "measurements.csv"


class Store:
    """A folder's trials."""

    def __init__(self, folder: Path):
        self.path = folder / LINES
        self.table = folder / TABLE

    def load(self) -> list[TrialResult]:
        """What was kept; a last line that was cut off in the middle is left out.

        Raises:
            UserError: the file cannot be read, or a line before the last is none of ours.
        """
        try:
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}.") from error
        whole, _, _ = text.rpartition("\n")
        return [from_json(line) for line in whole.splitlines() if line.strip()]

    def add(self, result: TrialResult) -> None:
        """Appends one, on the disk when this returns. Raises UserError when it cannot be written."""
        try:
            with self.path.open("ab+") as file:
                # A line that a killed sweep left half-written is ended, so that it spoils itself alone.
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    file.truncate(self._end_of_last_line())
                file.write(to_json(result).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}.") from error

    def write_csv(self, results: Iterable[TrialResult]) -> None:
        """The table with the columns of the shared measurements first."""
        write_table(self.table, CSV_COLUMNS, [measurement_cells(result) for result in results])

    def _end_of_last_line(self) -> int:
        return self.path.read_bytes().rfind(b"\n") + 1
