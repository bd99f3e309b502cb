"""Does the diagnosis name the faulty part, how soon, and never a healthy one? Live faults, healthy minutes, simulated fleets.

``python -m benchmarks.c4_diagnosis [--quick]``: (1) faults of all four classes into a real training of four processes on this
machine, watched by the real agents' and master's code; (2) healthy training with pauses; (3) the same through Ray actors, once;
(4) records of 1,024 and 10,000 simulated ranks.
"""

from __future__ import annotations

import collections
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from apps.program.report import PALETTE, new_figure
from benchmarks.c4 import live
from benchmarks.harness import Benchmark, Target, print_rows

TARGETS = [
    Target("live_accuracy", 0.9, 0.98, "higher", "class and culprit both right, live faults of all four classes"),
    Target("live_trials", 40, 100, "higher", "live faults injected (4 workers)"),
    Target("detection_p99_s", 5, 2, "lower", "onset to named culprit, live"),
    Target("false_alarms", 0, 0, "lower", "in healthy training with pauses to 5x the median step"),
    Target("healthy_minutes", 10, 30, "higher", "watched for false alarms"),
    Target("sim_accuracy_1024", 0.97, 0.99, "higher", "simulated, 1,024 ranks"),
    Target("sim_accuracy_10000", 0.97, 0.99, "higher", "simulated, 10,000 ranks"),
    Target("sim_two_faults_accuracy", 0.9, 0.95, "higher", "simulated, two faults at once, both named"),
    Target("master_verdict_s_10000_ranks", 2, 1, "lower", "one core"),
]


PARTS = ("live", "healthy", "actors", "simulated")


def main() -> int:
    """Runs everything; returns the exit code."""
    options: dict[str, dict[str, Any]] = {
        "--trials": {"type": int, "help": "live faults (default 60; 10 with --quick)"},
        "--healthy-minutes": {"type": float, "help": "default 10; 0.3 with --quick"},
        "--seed": {"type": int, "default": 0, "help": "of kinds, ranks, times and factors"},
        "--only": {"nargs": "+", "choices": PARTS, "default": PARTS, "help": "some parts alone"},
        "--faults-10000": {"type": int, "help": "simulated faults at 10,000 ranks (default 1,000; 8 with --quick)"},
    }
    bench = Benchmark("c4_diagnosis", __doc__ or "", TARGETS, options=options)
    only = bench.arguments.only
    with tempfile.TemporaryDirectory(prefix="sextant-c4-bench-", dir=_shared_memory()) as folder:
        rings = Path(folder)
        if "live" in only:
            run_live(bench, rings)
        if "healthy" in only:
            run_healthy(bench, rings)
        if "actors" in only:
            run_actors(bench, rings)
    if "simulated" in only:
        from benchmarks.c4.simulated import run_simulated

        run_simulated(bench)
    for part in dict.fromkeys(row["part"] for row in bench.rows):
        if part != "trial":
            print_rows(
                part, [{k: v for k, v in row.items() if k != "part"} for row in bench.rows if row["part"] == part]
            )
    return bench.finish()


def run_live(bench: Benchmark, rings: Path) -> None:
    """The injected faults: accuracy, detection times, confusion."""
    count = bench.arguments.trials or (10 if bench.quick else 60)
    bench.say(f"{count} live faults")
    done, false_alarms, monitor = live.trials(count, bench.arguments.seed, rings, bench.say)
    times = sorted(trial.detection_s for trial in done)
    bench.figure("live_accuracy", sum(trial.right for trial in done) / len(done))
    bench.figure("live_trials", len(done))
    bench.figure("detection_p99_s", times[min(len(times) - 1, math.ceil(0.99 * len(times)) - 1)])
    bench.figure("detection_p50_s", times[len(times) // 2])
    bench.figure("live_further_verdicts", sum(len(trial.named) - 1 for trial in done if trial.named))
    bench.figure("live_false_alarms_between", len(false_alarms))
    for trial in done:
        bench.row(
            part="trial",
            fault=trial.plan.name,
            culprit=trial.culprit,
            expected=trial.expected.value,
            named=[f"{one.verdict.kind.value}: {one.verdict.culprit}" for one in trial.named],
            detection_s=trial.detection_s,
            right=trial.right,
            note=trial.note,
        )
    for name in dict.fromkeys(trial.plan.name for trial in done):
        of_kind = [trial for trial in done if trial.plan.name == name]
        seen = collections.Counter(trial.named[0].verdict.kind.value if trial.named else "missed" for trial in of_kind)
        took = sorted(trial.detection_s for trial in of_kind)
        bench.row(
            part="live faults",
            fault=name,
            expected=of_kind[0].expected.value,
            trials=len(of_kind),
            right=sum(trial.right for trial in of_kind),
            median_s=took[len(took) // 2],
            max_s=took[-1],
            named=", ".join(f"{kind} {times}" for kind, times in seen.items()),
        )
    for alarm in false_alarms:
        bench.row(
            part="alarms between trials",
            verdict=f"{alarm.verdict.kind} {alarm.verdict.culprit}",
            evidence=alarm.verdict.evidence[0],
        )
    for error in monitor.errors:
        bench.row(part="errors of the monitors", error=error)
    draw_times(bench, done)


def draw_times(bench: Benchmark, done: list[live.Trial]) -> None:
    """Every detection as a dot, by kind of fault."""
    names = list(dict.fromkeys(trial.plan.name for trial in done))
    figure, axis = new_figure(7.0, 3.8)
    for right, colour in ((True, PALETTE[0]), (False, PALETTE[3])):
        some = [trial for trial in done if trial.right is right]
        label = "class and culprit right" if right else "wrong or missed"
        axis.plot(
            [trial.detection_s for trial in some], [names.index(trial.plan.name) for trial in some],
            "o", ms=5, alpha=0.6, color=colour, mew=0, label=label,
        )  # fmt: skip
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("from onset to named culprit (s)")
    axis.legend(frameon=False)
    bench.picture(figure, "detection")


def run_healthy(bench: Benchmark, rings: Path) -> None:
    """No fault, many pauses: nothing may be named; and what watching costs."""
    minutes = bench.arguments.healthy_minutes or (0.3 if bench.quick else 10)
    bench.say(f"{minutes:g} minutes of healthy training with pauses")
    alarms, watched, steps, monitor = live.healthy(minutes, bench.arguments.seed, rings, bench.say)
    seconds, ranks = watched * 60, len(steps)
    bench.figure("false_alarms", len(alarms))
    bench.figure("healthy_minutes", watched)
    bench.figure("observation_bytes_per_s_per_rank", monitor.bytes / seconds / ranks)
    bench.figure("agent_core_share_per_rank", monitor.agent_cpu_s / seconds / ranks)
    bench.figure("master_core_share", monitor.judge_cpu_s / seconds)
    bench.row(
        part="healthy", minutes=watched, steps=min(steps, default=0), alarms=len(alarms), errors=len(monitor.errors)
    )
    for alarm in alarms:
        bench.row(
            part="false alarms",
            verdict=f"{alarm.verdict.kind} {alarm.verdict.culprit}",
            evidence="; ".join(alarm.verdict.evidence),
        )


def run_actors(bench: Benchmark, rings: Path) -> None:
    """One hang through real Ray actors: named, evicted, fenced."""
    from benchmarks.c4.actors import hang_through_actors

    bench.say("one hang through Ray actors")
    bench.row(part="through Ray actors", **hang_through_actors(rings))


def _shared_memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    sys.exit(main())
