"""Program of test_c4_recovery.py: fits under C4 on a virtual cluster, hurt or at fault themselves; prints the outcome as JSON.

A process of its own, because the tests' process has a Ray of its own. ``python -m tests.cluster.c4_fits SCENARIO...``
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from actors.c4.recovery.policy import Prices
from benchmarks.c4.recovery import Fit, c4_trainer, virtual_cluster

WORLD_SIZE = 2
BUSY = {"prices": Prices(min_confidence=0.97)}
"""On a machine that others load, an agent may be silent for seconds: only what the operating system says is acted on."""


def faults(scratch: Path) -> dict[str, Any]:
    """A killed worker, then a stopped one; and the same run unbroken."""
    import ray

    with Fit(c4_trainer(WORLD_SIZE, scratch / "storage", **BUSY), scratch / "hurt", WORLD_SIZE) as fit:
        killed = fit.hurt("sigkill", 1, cap_s=100)
        stopped = fit.hurt("sigstop", 0, cap_s=100)
        quarantined = ray.get(fit.trainer.c4_master.quarantine.remote())
    if fit.error is not None:
        raise fit.error
    steps = int((fit.folder / "stop").read_text())
    with Fit(
        c4_trainer(WORLD_SIZE, scratch / "storage", **BUSY), scratch / "unbroken", WORLD_SIZE, 0.0, steps
    ) as unbroken:
        unbroken.join(timeout_s=100)
    if unbroken.error is not None:
        raise unbroken.error
    outcome = fit.result.c4
    with fit.result.checkpoint.as_directory() as folder:
        import torch

        last = torch.load(Path(folder) / "state.pt", weights_only=True)
    with unbroken.result.checkpoint.as_directory() as folder:
        truth = torch.load(Path(folder) / "state.pt", weights_only=True)
    return {
        "steps_lost": [killed.steps_lost, stopped.steps_lost],
        "survivors": [killed.survivors, stopped.survivors],
        "capped": [killed.capped, stopped.capped],
        "steps": steps,
        "last_step": last["step"],
        "same_weights": all(torch.equal(last["model"][name], truth["model"][name]) for name in truth["model"]),
        "losses": _pairs(fit),
        "unbroken_losses": _pairs(unbroken),
        "causes": [restart.cause for restart in outcome.restarts],
        "excluded": [list(restart.excluded) for restart in outcome.restarts],
        "resumed_from": [restart.resumed_from for restart in outcome.restarts],
        "quarantined": sorted(quarantined),
        "released": [node for node, _ in outcome.released],
        "verdicts": [
            {"kind": str(entry.verdict.kind), "ranks": list(entry.verdict.culprit.ranks), "action": str(entry.action)}
            for entry in outcome.verdicts
        ],
        "left_in_memory": _left(fit.trainer.c4_run),
    }


def mistake(scratch: Path) -> dict[str, Any]:
    """A loop that raises on one rank while its peer waits in a collective."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from actors.c4.trainer import C4Settings, C4Trainer

    trainer = C4Trainer(
        _raising_loop,
        train_loop_config={"marks": str(scratch)},
        scaling_config=ScalingConfig(num_workers=WORLD_SIZE),
        run_config=RunConfig(
            name="mistake", storage_path=str(scratch / "storage"), failure_config=FailureConfig(max_failures=1)
        ),
        c4=C4Settings(**BUSY),
    )
    import ray.train

    began = time.monotonic()
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        return {
            "error": str(error),
            "first_rank": next(iter(error.worker_failures)),  # type: ignore[attr-defined]
            "runs": len(list(scratch.glob("run-*-0"))),
            "seconds": time.monotonic() - began,
            "verdicts": []
            if trainer.c4_outcome is None
            else [str(e.verdict.kind) for e in trainer.c4_outcome.verdicts],
        }
    return {"error": ""}


def _raising_loop(config: dict[str, Any]) -> None:
    import os

    import ray.train
    import torch
    import torch.distributed as dist

    rank = ray.train.get_context().get_world_rank()
    (Path(config["marks"]) / f"run-{os.getpid()}-{rank}").touch()
    for step in range(5):
        if step == 3 and rank == 1:
            raise ValueError("labels must be below 10")
        dist.all_reduce(torch.ones(4))


def deepspeed(scratch: Path) -> dict[str, Any]:
    """ZeRO-2 with its own checkpoint directory, every rank reporting its shard; a worker is killed."""
    import os
    import signal

    from ray.train import RunConfig, ScalingConfig

    from actors.c4.trainer import C4Settings, C4Trainer

    losses = {}
    for name in ("unbroken", "hurt"):
        folder = scratch / f"ds-{name}"
        folder.mkdir(parents=True)

        def make(folder: Path, steps: int | None, step_s: float) -> Any:
            return C4Trainer(
                _zero_loop,
                train_loop_config={"folder": str(folder), "steps": 12, "pause_s": 0.2},
                scaling_config=ScalingConfig(num_workers=WORLD_SIZE),
                run_config=RunConfig(name=folder.name, storage_path=str(scratch / "storage")),
                c4=C4Settings(**BUSY),
            )

        with Fit(make, folder, WORLD_SIZE, steps=12) as fit:
            if name == "hurt":
                os.kill(fit.wait_for_steps(4)[1], signal.SIGKILL)
            fit.join(timeout_s=150)
        if fit.error is not None:
            raise fit.error
        losses[name] = _pairs(fit)
    return {"losses": losses["hurt"], "unbroken_losses": losses["unbroken"], "restarts": len(fit.result.c4.restarts)}


def _zero_loop(config: dict[str, Any]) -> None:
    import json
    import os
    import tempfile
    import time

    import deepspeed
    import ray.train
    import torch
    from ray.train import Checkpoint

    rank = ray.train.get_context().get_world_rank()
    record = (Path(config["folder"]) / f"rank{rank}-{os.getpid()}.jsonl").open("a", buffering=1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    deepspeed.init_distributed()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 8,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        },
    )
    first = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            _, state = engine.load_checkpoint(folder)
        first = state["step"] + 1
    record.write(
        json.dumps({"event": "ready", "at": time.time(), "rank": rank, "pid": os.getpid(), "step": first}) + "\n"
    )
    for step in range(first, config["steps"]):
        inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(10 * step + rank))
        loss = (engine(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        engine.backward(loss)
        engine.step()
        time.sleep(config["pause_s"])
        with tempfile.TemporaryDirectory() as folder:
            # Each rank writes its own shard into a folder of its own node; the reports together make the checkpoint.
            engine.save_checkpoint(folder, tag="zero", client_state={"step": step})
            ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder))
        row = {"event": "step", "at": time.time(), "rank": rank, "pid": os.getpid(), "step": step, "loss": loss.item()}
        record.write(json.dumps(row) + "\n")


def _pairs(fit: Fit) -> dict[int, list[Any]]:
    return {step: sorted(pairs) for step, pairs in fit.records.losses().items()}


def _left(run: str) -> list[str]:
    """What a run left in shared memory."""
    return [str(path) for path in Path("/dev/shm").glob(f"sextant-c4-{run}*")] if Path("/dev/shm").is_dir() else []


SCENARIOS = {"faults": faults, "mistake": mistake, "deepspeed": deepspeed}


def main() -> None:
    wanted = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name, virtual_cluster(WORLD_SIZE + 2):
        for scenario in wanted:
            scratch = Path(name) / scenario
            scratch.mkdir()
            print("FOUND", scenario, json.dumps(SCENARIOS[scenario](scratch)), flush=True)


if __name__ == "__main__":
    main()
