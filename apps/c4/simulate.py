"""The verb `simulate`: faults in a simulated fleet of 64 to 10,000 ranks, judged by the same diagnosis as a live job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import typer

from actors.c4.diagnosis.connections import delay_matrix
from actors.c4.diagnosis.waits import waiting_edges
from apps.c4.fleet.campaign import CampaignResult, Plan, run_campaign, wilson
from apps.c4.fleet.clockwork import Pace, effects_of
from apps.c4.fleet.faults import CLASSES, FleetFault, Injected
from apps.c4.fleet.observe import Struck
from apps.c4.fleet.shape import Shape, shape_for
from apps.c4.fleet.trial import HealthyJob, onset_of
from apps.program.errors import UserError

LABELS = {name: name.replace("_", " ") for name in CLASSES}


def simulate(
    ranks: Annotated[int, typer.Option(min=64, help="Ranks of the job: whole nodes of 8.")] = 1024,
    faults: Annotated[int, typer.Option(min=1, help="Trials.")] = 200,
    pairs: Annotated[bool, typer.Option("--pairs", help="Two faults of different classes in each trial.")] = False,
    slowdown: Annotated[float, typer.Option(min=1.0, help="Least factor of slow faults; up to 4.")] = 1.5,
    noise: Annotated[float, typer.Option(min=0, max=0.5, help="Standard deviation of every duration, relative.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same trials.")] = 0,
    processes: Annotated[int, typer.Option(min=1, max=256)] = 1,
    out: Annotated[str | None, typer.Option(help="Root of the run folders (default: runs).")] = None,
) -> int:
    """Inject faults into a simulated fleet and print how often class and culprit are named right."""
    from apps.program.report import Report, print_table
    from apps.program.run_folder import new_run_folder

    try:
        shape = shape_for(ranks)
    except ValueError as error:
        raise UserError(str(error)) from error
    if slowdown > 4:
        raise UserError(f"--slowdown is the least factor, from 1 to 4; {slowdown:g} is above the largest.")
    plan = Plan(
        ranks=ranks, faults=faults, pairs=pairs, slowdown=(slowdown, 4.0), noise=noise, seed=seed, processes=processes,
        side_by_side=max(1, min(10, 20_000 // ranks)),
    )  # fmt: skip
    kind = "pairs of faults" if pairs else "faults"
    print(
        f"{faults} {kind} in jobs of {ranks} ranks (data {shape.data} x tensor {shape.tensor} x pipeline {shape.pipeline})",
        flush=True,
    )
    began = time.monotonic()
    told = [began]

    def progress(done: int, right: int) -> None:
        if time.monotonic() - told[0] > 5:
            told[0] = time.monotonic()
            print(f"  {done} of {faults}: {right} right, {told[0] - began:.0f} s", flush=True)

    result = run_campaign(plan, progress)
    tables = {"Accuracy by class": accuracy_rows(result), "What faults were called": confusion_rows(result)}
    for title, (columns, rows) in tables.items():
        print_table(columns, rows, title=title)
    wrong = [trial for trial in result.trials if not trial.right]
    for trial in wrong[:5]:
        said = "; ".join(f"{verdict.kind.value} {verdict.culprit}" for verdict in trial.verdicts) or "nothing"
        print(f"wrong: {' and '.join(map(str, trial.faults))}: named {said}")
    folder = new_run_folder("c4", out)
    folder.write_result({"plan": plan, "accuracy": result.accuracy, "trials": len(result.trials),
                         "false_alarms": result.false_alarms,
                         "confusion": {" -> ".join(key): count for key, count in result.confusion().items()},
                         "wrong": [{"faults": trial.faults, "verdicts": trial.verdicts} for trial in wrong]})  # fmt: skip
    report = Report("C4: a simulated fleet", f"{len(result.trials)} trials, {result.accuracy:.1%} right")
    for title, (columns, rows) in tables.items():
        report.add_table(title, columns, rows)
    for heading, figure, caption in example_pictures(seed):
        report.add_figure(heading, figure, caption)
    print(f"{result.accuracy:.2%} right in {time.monotonic() - began:.0f} s. Report: {report.write(folder)}")
    return 0


def accuracy_rows(result: CampaignResult) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: trials, right, share and 95 % interval for each class, and time to name in steps."""
    rows: list[list[Any]] = []
    for name, label in [*LABELS.items(), ("", "all")]:
        trials = result.of_class(name) if name else result.trials
        right = sum(trial.right for trial in trials)
        low, high = wilson(right, len(trials))
        steps = [seconds / trial.step_s for trial in trials for seconds in trial.detection_s]
        p50, p99 = (float(np.percentile(steps, q)) for q in (50, 99)) if steps else (float("nan"), float("nan"))
        share = right / len(trials) if trials else float("nan")
        rows.append([label, len(trials), right, share, f"{low:.3f} to {high:.3f}", p50, p99])
    rows.append(["healthy steps: false alarms", result.healthy_steps, len(result.false_alarms), None, "", None, None])
    return ["class", "trials", "right", "share", "95 % interval", "steps to name, P50", "P99"], rows


def confusion_rows(result: CampaignResult) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: true class by what it was called."""
    counts = result.confusion()
    said = sorted({name for _, name in counts}, key=lambda name: (name not in CLASSES, name))
    rows: list[list[Any]] = [[LABELS[true], *(counts.get((true, name), 0) for name in said)] for true in CLASSES]
    return ["fault", *(LABELS.get(name, name.replace("_", " ")) for name in said)], rows


def example_pictures(seed: int) -> Sequence[tuple[str, Any, str]]:
    """(heading, figure, caption): delay matrix of a slow sender and waiting chain of a stuck rank, in a job of 16 ranks."""
    from apps.c4.pictures import delay_matrix_figure, waiting_chain_figure

    shape = Shape(data=4, tensor=2, pipeline=2, micro_batches=4)
    job = HealthyJob(shape, Pace(), seed)
    culprit = shape.ranks // 2 + 3
    slow = FleetFault(Injected.SENDER_SLOW, (culprit,), factor=3.0)
    step = job.clock.fork(1, seed).step(effects_of(shape, [[slow]]))
    seen = job.reporter.observe(0, 1e9, job.last, step, job.steps - 1, job.step_s, [(job.steps, step)])
    matrix = delay_matrix(seen, shape.ranks)
    hot = [(culprit, int(to)) for to in np.flatnonzero(np.isfinite(matrix[culprit])) if int(to) // 8 != culprit // 8]
    first = delay_matrix_figure(matrix, hot, f"Rank {culprit} sends slowly: a hot row")

    stuck = FleetFault(Injected.STUCK, (culprit,), wave=3)
    clock = job.clock.fork(1, seed)
    free = clock.free.copy()
    step = clock.step(effects_of(shape, [[stuck]]))
    onset = onset_of(shape, free, step, 0, stuck)
    now = (onset or float(job.clock.free.max())) + 8 * job.step_s
    seen = job.reporter.observe(
        0, now, job.last, step, job.steps - 1, job.step_s, struck=[Struck(stuck, onset or now)], links=True
    )
    edges = waiting_edges(seen)
    return [
        ("Delay matrix", first, "From source (row) to destination (column); framed: out of the culprit to other nodes."),
        ("Waiting chain", waiting_chain_figure(edges, [culprit], shape.ranks, f"Rank {culprit} is stuck"),
         "Each arrow: a rank inside an operation waits for one that has not entered it. All chains end at the culprit."),
    ]  # fmt: skip
