"""What a sparsity pattern costs in accuracy: balanced and block pruning against unstructured, CNN and LSTM, seeds paired.

    python -m benchmarks.balanced_accuracy [--quick] [--data DIR] --out DIR

A seed trains a dense network; every arm begins from it, sees the same batches, rises by the same schedule to the same share of
zeros (24 and 29 of 32, which all three patterns can have). The gap of an arm is its seed-by-seed difference to unstructured, with
the 95 % interval of the paired t-test. Also the trained speaker encoder, at 80 % after pruning and retraining.

Full: a VGG-style net on CIFAR-10 (points of accuracy), a word-level LSTM on Gutenberg's books (percent of perplexity), the TIMIT
sample's speakers; data and weights are not part of the repository. Quick: scikit-learn's digits, as images and row by row.
"""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import REPOSITORY, Benchmark, Target, print_rows

ARMS = ("unstructured", "balanced:32", "block:8x8")
SPARSITIES = {75: 1 - 8 / 32, 90: 1 - 3 / 32}
SEEDS = (1, 2, 3)
WORKLOADS = ("cnn", "lstm")
SPEAKER_PACKAGE = "resemblyzer"

TARGETS = [
    Target("accuracy_gap_balanced_vs_unstructured", 0, 0, "lower",
           "of all cells the greatest lower end of the gap's 95 % interval: <= 0 is within noise"),
    Target("accuracy_gap_block_vs_unstructured", 0, 1, "higher",
           "of all cells the smallest lower end of the gap's 95 % interval: > 0 is clearly worse"),
]  # fmt: skip
SPEAKER_TARGETS = [
    Target("speaker_id_loss_points", 2, 0.5, "lower", "dense minus pruned (80 %) and retrained, held-out sentences"),
]


@dataclass(frozen=True)
class Outcome:
    """One network: scores in percent right, or perplexity."""

    workload: str
    seed: int
    arm: str
    percent: int
    score: float
    higher_is_better: bool
    zeros: float
    seconds: float


@dataclass(frozen=True)
class Gap:
    """How much worse an arm is than unstructured: points of accuracy, or percent of perplexity; above 0 is worse."""

    workload: str
    percent: int
    arm: str
    mean: float
    low: float
    high: float
    p: float
    unit: str


@dataclass(frozen=True)
class Plan:
    """What a process of the pool is to do."""

    workload: str
    seed: int
    quick: bool
    data: Path


def main(arguments: Sequence[str] | None = None) -> int:
    option = {
        "--data": {"type": Path, "default": _default_data(), "metavar": "DIR", "help": "real data of the full form"}
    }
    bench = Benchmark("balanced_accuracy", __doc__.splitlines()[0], TARGETS, arguments, options=option)
    data: Path = bench.arguments.data
    if not bench.quick:
        if not data.is_dir():
            print(f"balanced_accuracy: there is no data at {data}: give --data DIR, or --quick.", file=sys.stderr)
            return 2
        if importlib.util.find_spec(SPEAKER_PACKAGE) is not None:
            bench.targets = (*bench.targets, *SPEAKER_TARGETS)
        else:
            bench.say("the speaker encoder is left out: pip install --no-deps resemblyzer==0.1.4")
    plans = [Plan(workload, seed, bench.quick, data) for seed, workload in itertools.product(SEEDS, WORKLOADS)]
    if len(bench.targets) > len(TARGETS):
        plans.insert(0, Plan("speaker", SEEDS[0], False, data))
    outcomes = _all(plans, bench)
    for outcome in sorted(outcomes, key=lambda one: (one.workload, one.percent, one.arm, one.seed)):
        bench.row(**vars(outcome))
    gaps = [
        gap_of(outcomes, workload, percent, arm)
        for workload, percent, arm in itertools.product(WORKLOADS, SPARSITIES, ARMS[1:])
    ]
    print_rows(
        "Gap to unstructured (above 0 is worse), 95 % interval of the paired t-test", [vars(gap) for gap in gaps]
    )
    _figures(bench, outcomes, gaps)
    bench.picture(_picture(gaps))
    return bench.finish()


def gap_of(outcomes: Sequence[Outcome], workload: str, percent: int, arm: str) -> Gap:
    """Of one cell, over its seeds. Perplexities are compared by their logarithm: 100 (exp(difference) - 1) percent."""
    from scipy.stats import ttest_rel

    def scores(which: str) -> Any:
        found = [o for o in outcomes if (o.workload, o.percent, o.arm) == (workload, percent, which)]
        return np.array([one.score for one in sorted(found, key=lambda one: one.seed)])

    accuracy = next(one.higher_is_better for one in outcomes if one.workload == workload)
    ours, theirs = scores(arm), scores(ARMS[0])
    worse, than = (theirs, ours) if accuracy else (np.log(ours), np.log(theirs))
    differences = worse - than
    if np.ptp(differences) == 0:  # the t-test has no answer for a spread of zero
        mean, low, high, p = float(differences[0]), float(differences[0]), float(differences[0]), float("nan")
    else:
        test = ttest_rel(worse, than)
        interval = test.confidence_interval(0.95)
        mean, low, high, p = float(differences.mean()), float(interval.low), float(interval.high), float(test.pvalue)
    if accuracy:
        return Gap(workload, percent, arm, mean, low, high, p, "points")
    mean, low, high = (100 * float(np.expm1(value)) for value in (mean, low, high))
    return Gap(workload, percent, arm, mean, low, high, p, "% perplexity")


def _figures(bench: Benchmark, outcomes: Sequence[Outcome], gaps: Sequence[Gap]) -> None:
    for name, arm in (("balanced", "balanced:32"), ("block", "block:8x8")):
        mine = [gap for gap in gaps if gap.arm == arm]
        key = f"accuracy_gap_{name}_vs_unstructured"
        lows = [gap.low for gap in mine]
        bench.figure(key, max(lows) if name == "balanced" else min(lows))
        for gap in mine:
            cell = f"{key}_{gap.workload}_{gap.percent}"
            bench.figure(cell, gap.mean)
            bench.figure(f"{cell}_low", gap.low)
            bench.figure(f"{cell}_high", gap.high)
    means = {(gap.workload, gap.percent, gap.arm): gap.mean for gap in gaps}
    shares = [
        means[workload, percent, ARMS[1]] / means[workload, percent, ARMS[2]]
        for workload, percent in itertools.product(WORKLOADS, SPARSITIES)
        if means[workload, percent, ARMS[2]]
    ]
    if shares:
        bench.figure(
            "balanced_gap_over_block_gap", max(shares)
        )  # of the worst cell; means something where block is worse
    for workload in WORKLOADS:
        dense_scores = [one.score for one in outcomes if (one.workload, one.arm) == (workload, "dense")]
        bench.figure(f"{workload}_dense", float(np.mean(dense_scores)))
    speaker = {(one.arm, one.percent): one.score for one in outcomes if one.workload == "speaker"}
    if speaker:
        dense, pruned = speaker["dense", 0], speaker["balanced:32", 80]
        bench.figure("speaker_id_dense", dense)
        bench.figure("speaker_id_80", pruned)
        bench.figure("speaker_id_loss_points", dense - pruned)
        bench.figure("speaker_id_one_shot_75", speaker["balanced:32, one shot", 75])


def _all(plans: Sequence[Plan], bench: Benchmark) -> list[Outcome]:
    """Every plan in a process of its own with one thread, as many at a time as there are cores."""
    cores = len(os.sched_getaffinity(0))
    outcomes: list[Outcome] = []
    # Before the children import torch: its threads are counted then.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(cores, len(plans)), mp_context=context) as pool:
            waiting = {pool.submit(carry_out, plan): plan for plan in plans}
            for done in as_completed(waiting):
                plan = waiting[done]
                outcomes += done.result()
                bench.say(f"{plan.workload}, seed {plan.seed}: done, {len(waiting)} plans in all")
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return outcomes


def carry_out(plan: Plan) -> list[Outcome]:
    """A dense network and all arms of one seed."""
    import torch

    torch.set_num_threads(1)
    return _speaker(plan) if plan.workload == "speaker" else _workload(plan)


def _workload(plan: Plan) -> list[Outcome]:
    from apps.balanced_sparsity.store import MODEL_FILE, save_trained
    from apps.balanced_sparsity.training.loop import Job, run
    from apps.balanced_sparsity.training.tasks import make_task
    from apps.training.worker import LocalWorker

    config = _config(plan)
    task = make_task(config, LocalWorker())
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        dense = run(Job(config), LocalWorker(), task)
        start = Path(folder) / MODEL_FILE
        save_trained(start, dense)
        outcomes = [_outcome(plan, "dense", 0, dense, task, time.monotonic() - began)]
        for percent, arm in itertools.product(SPARSITIES, ARMS):
            began = time.monotonic()
            pruning = config.pruning.model_copy(update={"pattern": arm, "sparsity": SPARSITIES[percent]})
            pruned = run(Job(config.model_copy(update={"pruning": pruning}), True, str(start)), LocalWorker(), task)
            outcomes.append(_outcome(plan, arm, percent, pruned, task, time.monotonic() - began))
            if abs(pruned.sparsity - SPARSITIES[percent]) > 0.006:
                raise ValueError(
                    f"{plan.workload}: {arm} has {pruned.sparsity:.3f} zeros, not {SPARSITIES[percent]:.3f}"
                )
    return outcomes


def _speaker(plan: Plan) -> list[Outcome]:
    """The dense encoder, one shot at 75 %, and at 80 % (6 of 32) pruned gradually and retrained; sentences held out from all."""
    from apps.balanced_sparsity.training.loop import Job, evaluate, run
    from apps.balanced_sparsity.training.tasks import make_task
    from apps.training.worker import LocalWorker

    config, worker = _config(plan), LocalWorker()
    task = make_task(config, worker)
    dense = evaluate(task.model(), task, worker)["accuracy"]
    outcomes = [Outcome("speaker", plan.seed, "dense", 0, 100 * dense, True, 0.0, 0.0)]
    one_shot = config.pruning.model_copy(update={"sparsity": 0.75, "rise_steps": 0, "retrain_steps": 0})
    for name, percent, pruning in (("balanced:32, one shot", 75, one_shot), ("balanced:32", 80, config.pruning)):
        began = time.monotonic()
        pruned = run(Job(config.model_copy(update={"pruning": pruning}), True), LocalWorker(), task)
        outcomes.append(_outcome(plan, name, percent, pruned, task, time.monotonic() - began))
    return outcomes


def _outcome(plan: Plan, arm: str, percent: int, trained: Any, task: Any, seconds: float) -> Outcome:
    score = trained.figures[trained.score] * (100 if trained.score == "accuracy" else 1)
    return Outcome(plan.workload, plan.seed, arm, percent, score, task.higher_is_better, trained.sparsity, seconds)


def _config(plan: Plan) -> Any:
    """Networks and lengths that fit the time: two minutes, or a quarter of an hour, on two cores."""
    from apps.balanced_sparsity.config import BalancedSparsityConfig
    from apps.program.config import load_config

    data = plan.data
    common = [f"training.seed={plan.seed}", "training.workers=0", "training.report_every=100000"]
    if plan.workload == "speaker":
        preset, rest = "speaker", [
            f"data.train={data / 'speech' / 'timit_sample.tar.xz'}",
            f"data.more_speech={data / 'speech' / 'fsdd_recordings.tar.xz'}",
        ]  # fmt: skip
    elif plan.quick and plan.workload == "cnn":
        preset, rest = "cpu", [
            "model.vgg.stages=[[32,32],[32]]", "training.steps=150", "training.batch=64",
            "pruning.rise_steps=60", "pruning.retrain_steps=150", "pruning.every=5",
        ]  # fmt: skip
    elif plan.quick:
        preset, rest = "digit_rows", [
            "model.lstm.hidden=96", "training.steps=300", "training.batch=64", "training.clip_norm=5",
            "pruning.rise_steps=100", "pruning.retrain_steps=150", "pruning.every=5", "pruning.learning_rate=2e-3",
            "pruning.skip=[lstm.weight_ih_l0,classifier]",  # 8 columns are no block of 32
        ]  # fmt: skip
    elif plan.workload == "cnn":
        preset, rest = "cpu", [
            "data.name=cifar10", f"data.train={data / 'images' / 'cifar10_train.tar.xz'}",
            f"data.test={data / 'images' / 'cifar10_test.tar.xz'}", "data.shift=2",
            "model.vgg.stages=[[32],[32,32],[64,64]]", "training.steps=800", "training.batch=64", "training.learning_rate=2e-3",
            "pruning.rise_steps=100", "pruning.retrain_steps=120", "pruning.every=10", "pruning.learning_rate=2e-3",
        ]  # fmt: skip
    else:
        preset, rest = "lstm_small", [
            "data.name=text", f"data.train={data / 'text' / 'gutenberg.tar.xz'}", "data.vocabulary=2000", "data.held_out=0.03",
            "data.sequence=32", "model.lstm.hidden=192", "training.epochs=null", "training.steps=600", "training.batch=32",
            "training.learning_rate=4e-3", "pruning.rise_steps=70", "pruning.retrain_steps=70", "pruning.every=10",
            "pruning.learning_rate=2e-3",
        ]  # fmt: skip
    return load_config(BalancedSparsityConfig, preset, [*common, *rest], system="balanced_sparsity")


def _picture(gaps: Sequence[Gap]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots(1, len(WORKLOADS))
    for axis, workload in zip(axes, WORKLOADS, strict=True):
        mine = [gap for gap in gaps if gap.workload == workload]
        for number, gap in enumerate(mine):
            colour = "#0072B2" if gap.arm.startswith("balanced") else "#D55E00"
            axis.errorbar(
                number, gap.mean, [[gap.mean - gap.low], [gap.high - gap.mean]], fmt="o", color=colour, capsize=4
            )
        axis.set_xticks(range(len(mine)), [f"{gap.arm}\n{gap.percent} %" for gap in mine], fontsize=8)
        axis.axhline(0, color="black", linewidth=1)
        axis.grid(axis="y", alpha=0.3)
        axis.set_title(f"{workload}: worse than unstructured by ({mine[0].unit})", fontsize=9)
    return figure


def _default_data() -> Path:
    return Path(os.environ.get("SEXTANT_SHARED_DATA") or REPOSITORY.parent / "shared" / "data")


if __name__ == "__main__":
    sys.exit(main())
