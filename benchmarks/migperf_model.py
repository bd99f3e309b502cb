"""MIGPerf's models against published measurements: latency and memory of slices that a workload was not measured on.

``python -m benchmarks.migperf_model [--quick]``: leave-one-family-out (benchmarks/migperf/leave_out.py). Of the
tested workload the predictor sees the rows of the whole GPU (7g) and of 2g, the same for all three sources. The full
run chooses hyper-parameters by nested leave-one-out (benchmarks/migperf/nested.py), and its figures are those;
``--quick`` takes the shipped hyper-parameters, whose figures the full run prints too (``*_fixed``). Baselines see the
same rows. Needs ../shared/data/mig (or SEXTANT_SHARED_DATA).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apps.program.report import PALETTE, new_figure
from benchmarks.harness import REPOSITORY, Benchmark, Target, print_rows
from benchmarks.migperf.leave_out import (
    SOURCES,
    Case,
    Score,
    coverage,
    learn_without,
    leave_one_out,
    linear_scaling,
    load_cases,
    mape,
    nearest,
    power_law,
)
from benchmarks.migperf.nested import nested

MAIN_PROTOCOL = "7g+2g"
MEMORY_PROTOCOL = "7g"
"""The hardest: what runs out of memory on a slice, from the whole GPU's rows alone."""
SHOWN_PROTOCOLS = ("7g", "7g+1g", "7g+2g", "7g+3g")

PREDICTION_TARGETS = [
    Target("predict_mape_migprofiler", 8, 5, "lower", "% error, unseen workload, rows of 7g and 2g known"),
    Target("predict_mape_parvagpu", 10, 7, "lower", "% error, as above"),
    Target("predict_mape_miso", 12, 9, "lower", "% error, as above"),
    Target("oom_recall", 0.9, 1.0, "higher", "of MIGPerf's OOM cells, rows of 7g known"),
    Target("oom_false_alarms", 3, 2, "lower", "among MIGPerf's feasible rows"),
]
# Further parts (geometry against brute force, ...) put their targets and their functions beside these.
TARGETS = [*PREDICTION_TARGETS]

BASELINES: dict[str, Callable[[Case, str], NDArray[np.float64]]] = {
    "power_law": power_law,
    "linear_in_SMs": linear_scaling,
    "nearest_slice": nearest,
}


def main() -> int:
    """Runs everything; returns the exit code."""
    bench = Benchmark("migperf_model", __doc__ or "", TARGETS)
    parts: dict[str, Callable[[Benchmark], None]] = {"prediction": prediction}
    for part in parts.values():
        part(bench)
    for part in dict.fromkeys(row["part"] for row in bench.rows):
        print_rows(part, [{k: v for k, v in row.items() if k != "part"} for row in bench.rows if row["part"] == part])
    return bench.finish()


# ---- prediction


def prediction(bench: Benchmark) -> None:
    """Latency and memory of slices on which the tested workload was not measured."""
    folder = Path(os.environ.get("SEXTANT_SHARED_DATA") or REPOSITORY.parent / "shared" / "data") / "mig"
    if not folder.is_dir():
        bench.say(f"no measurements at {folder}: set SEXTANT_SHARED_DATA to the folder of real data")
        return
    cases = load_cases(folder)
    families = sorted({case.family for case in cases})
    bench.say(f"{len(cases)} workloads of {len(families)} families, left out one by one")
    fixed = leave_one_out(cases, SHOWN_PROTOCOLS, {family: learn_without(cases, [family]) for family in families})
    chosen: Mapping[str, Sequence[Score]] = fixed
    if not bench.quick:
        result = nested(cases, (MEMORY_PROTOCOL, MAIN_PROTOCOL), say=bench.say)
        chosen = result.scores
        for family, setting in result.chosen.items():
            bench.row(part="chosen without the family", family=family, noise=setting.noise,
                      cell_deviation=setting.cell_deviation, slice_deviation=setting.slice_deviation,
                      interval_scale=setting.interval_scale)  # fmt: skip
    for source in SOURCES:
        bench.figure(f"predict_mape_{source}", mape(chosen[MAIN_PROTOCOL], source))
    _memory(bench, chosen)
    for source in SOURCES:
        if not bench.quick:
            bench.figure(f"predict_mape_{source}_fixed", mape(fixed[MAIN_PROTOCOL], source))
        bench.figure(f"coverage_90_{source}", coverage(chosen[MAIN_PROTOCOL], source))
        for name, baseline in BASELINES.items():
            errors = [baseline(case, MAIN_PROTOCOL) for case in cases if case.source == source]
            bench.figure(f"{name}_mape_{source}", 100 * float(np.mean(np.concatenate(errors))))
    _rows(bench, fixed)
    _draw(bench, cases, chosen[MAIN_PROTOCOL])


def _memory(bench: Benchmark, scores: Mapping[str, Sequence[Score]]) -> None:
    """The main figures count MIGPerf's rows, whose frame buffer was measured; ParvaGPU's (nothing measured) stand beside."""
    for protocol, source, suffix in (
        (MEMORY_PROTOCOL, "migprofiler", ""),
        (MAIN_PROTOCOL, "migprofiler", "_7g_and_2g"),
        (MAIN_PROTOCOL, "parvagpu", "_parvagpu"),
    ):
        counted = [one for one in scores[protocol] if one.case.source == source]
        cells = sum(one.oom_cells for one in counted)
        bench.figure(f"oom_recall{suffix}", sum(one.oom_hits for one in counted) / cells)
        bench.figure(f"oom_false_alarms{suffix}", sum(one.false_alarms for one in counted))
        bench.row(part="memory", known=protocol, source=source, out_of_memory=cells,
                  found=sum(one.oom_hits for one in counted), feasible=sum(one.feasible for one in counted),
                  false_alarms=sum(one.false_alarms for one in counted))  # fmt: skip


def _rows(bench: Benchmark, fixed: Mapping[str, Sequence[Score]]) -> None:
    """Every protocol by source, and every workload under the main one; shipped hyper-parameters."""
    for protocol in SHOWN_PROTOCOLS:
        for source in SOURCES:
            count = sum(len(one.error) for one in fixed[protocol] if one.case.source == source)
            bench.row(part="by what is known (shipped hyper-parameters)", known=protocol, source=source, rows=count,
                      mape=mape(fixed[protocol], source), coverage_90=coverage(fixed[protocol], source))  # fmt: skip
    for one in fixed[MAIN_PROTOCOL]:
        first = one.case.group.rows[0]
        errors = [100 * float(np.mean(baseline(one.case, MAIN_PROTOCOL))) for baseline in BASELINES.values()]
        bench.row(part=f"by workload, {MAIN_PROTOCOL} known", source=one.case.source, workload=first.workload, mode=first.mode,
                  rows=len(one.error), mape=mape([one]), median=100 * float(np.median(one.error)), coverage_90=coverage([one]),
                  **dict(zip(BASELINES, errors, strict=True)))  # fmt: skip


def _draw(bench: Benchmark, cases: Sequence[Case], scores: Sequence[Score]) -> None:
    """Mean errors of the predictor and of the baselines, by source."""
    figure, axes = new_figure(7.5, 4)
    arms = {"Sextant": [mape(scores, source) for source in SOURCES]}
    for name, baseline in BASELINES.items():
        found = [np.concatenate([baseline(case, MAIN_PROTOCOL) for case in cases if case.source == s]) for s in SOURCES]
        arms[name.replace("_", " ")] = [100 * float(np.mean(errors)) for errors in found]
    for number, (name, values) in enumerate(arms.items()):
        places = np.arange(len(SOURCES)) + (number - 1.5) * 0.2
        axes.bar(places, values, 0.19, label=name, color=PALETTE[number % len(PALETTE)])
        for place, value in zip(places, values, strict=True):
            axes.annotate(f"{value:.1f}", (place, value), ha="center", va="bottom", fontsize=8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(SOURCES)), SOURCES)
    axes.set_ylabel("mean error of unmeasured slices, %")
    axes.set_title("An unseen workload, known on 7g and 2g")
    axes.set_ylim(top=500)
    axes.legend(frameon=False, ncols=len(arms), loc="upper center")
    bench.picture(figure)


if __name__ == "__main__":
    sys.exit(main())
