"""The process that measures: ``python -m apps.migperf.sweep.worker``. Told by lines of JSON on stdin, answers on stdout.

    {"environment": {...}, "point": {...}, "dtype": "float32"}     ->  {"ready": {...}} | {"oom": "..."} | {"failed": "..."}
    {"measure_s": 2.0, "seed": 1}                                   ->  {"window": {...}} | {"oom": "..."} | ...
    {"steps": 5}                                                    ->  {"window": {...}}        (exactly so many batches)
    end of stdin                                                    ->  the process ends

The first line holds the environment of the lease, because a lease needs the id of a process that exists: torch is imported
only after it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from actors.mig.backends import BackendError, enter_slice

WARM_UP_STEPS = 2


def main() -> None:
    # What libraries print must not mix with the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    lines = _lines()

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        first = next(lines)
        began = time.perf_counter()
        inside = enter_slice(first["environment"] or None)
    except StopIteration:
        return
    except BackendError as error:
        say(failed=str(error))
        return
    import torch

    from apps.migperf.sweep.loops import Window, closed_loop, open_loop
    from apps.migperf.sweep.trial import TrialPoint
    from apps.migperf.workloads.build import Workload, is_out_of_memory
    from apps.migperf.workloads.shapes import shape

    point = TrialPoint(**first["point"])
    try:
        with inside.torch_ready():
            device = "cuda" if inside.backend in ("mig", "green", "mps") or first.get("cuda") else "cpu"
            if inside.backend == "none" and device == "cpu":
                torch.set_num_threads(first.get("threads") or torch.get_num_threads())
            dtype = getattr(torch, first.get("dtype", "float32"))
            workload = Workload(
                shape(point.workload, point.scale), point.mode, point.batch, point.sequence, device, dtype
            )
            for _ in range(WARM_UP_STEPS):
                workload.step()
            say(ready={"seconds": time.perf_counter() - began, "parameters": workload.parameters})
            for command in lines:
                if "steps" in command:
                    before = time.perf_counter()
                    latencies = []
                    for _ in range(command["steps"]):
                        start = time.perf_counter()
                        workload.step()
                        latencies.append((time.perf_counter() - start) * 1e3)
                    window = Window(tuple(latencies), time.perf_counter() - before)
                elif point.rate_per_s is None:
                    window = closed_loop(workload.step, command["measure_s"])
                else:
                    window = open_loop(
                        workload.step, point.rate_per_s, command["measure_s"], seed=command.get("seed", 0)
                    )
                say(
                    window={
                        "latencies_ms": window.latencies_ms,
                        "seconds": window.seconds,
                        "dropped": window.dropped,
                        "memory_mib": workload.memory_mib(),
                    }
                )
    except Exception as error:
        if is_out_of_memory(error):
            say(oom=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        else:
            say(failed=f"{type(error).__name__}: {error}"[:500])


def _lines() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


if __name__ == "__main__":
    main()
