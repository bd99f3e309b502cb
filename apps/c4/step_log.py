"""A Ray Train callback that writes each reported step as a line of JSON; runs in the trainer's controller process."""

from __future__ import annotations

import json
import time
from typing import Any

from ray.train import UserCallback


class StepLog(UserCallback):
    """``path``: a file of the controller's host; what rank 0 reported with a step goes there."""

    def __init__(self, path: str):
        self.path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        first = metrics[0]
        if "step" in first:
            with open(self.path, "a") as file:
                file.write(json.dumps({"at_s": time.time(), **first}) + "\n")
