"""What a training under Ray Train reports, line by line: written by Ray Train's controller, followed by who waits."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ray.train import UserCallback


class ReportLog(UserCallback):
    """Ray Train's callback: each report of rank 0 becomes a line of JSON in ``path``, a file of the controller's host."""

    def __init__(self, path: str):
        self.path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(metrics[0]) + "\n")


@contextlib.contextmanager
def followed(path: Path, told: Callable[[dict[str, Any]], None], poll_s: float = 0.5) -> Iterator[None]:
    """Calls ``told`` with each entry that appears in ``path`` while the with-statement runs, and with the last ones at its end.

    What ``told`` raises ends the following and is raised when the with-statement is left.
    """
    ended = threading.Event()
    failed: list[BaseException] = []

    def follow() -> None:
        place = 0
        try:
            while True:
                last = ended.is_set()
                if path.exists():
                    with path.open() as file:
                        file.seek(place)
                        while (line := file.readline()).endswith("\n"):
                            place = file.tell()
                            told(json.loads(line))
                if last:
                    return
                ended.wait(poll_s)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=follow, name="follow-reports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if failed:
        raise failed[0]


__all__ = ["ReportLog", "followed"]
