"""C4P on Linux's own ECMP in network namespaces: ring all-reduces of the c4 process group by luck and by plan, and a cable cut.

Needs root and iproute2; without them it says so and its figures are missing. The simulator's prediction over the traced
paths stands beside each figure.
"""

from __future__ import annotations

import numpy as np

from apps.c4.paths.fabric import LabShape, why_not
from apps.c4.paths.lab import Lab, Measured
from benchmarks.harness import Benchmark, Target, print_rows

TARGETS = [
    Target("lab_gain_jobs", 1.3, 1.6, meaning="bus bandwidth planned / ECMP, 8 jobs, mean over draws"),
    Target("lab_fraction_of_line_rate", 0.85, 0.95, meaning="planned bus bandwidth / rate of a link"),
    Target("lab_after_link_failure_vs_ideal", 0.85, 0.95, meaning="mean bus bandwidth after a cut / a fluid's"),
    Target("lab_seconds_to_replan", 5, 1, "lower", "from the cut until rings with new ports had met"),
    Target("lab_prediction_error", 0.15, 0.10, "lower", "greatest relative error of the simulator on a mean"),
]


def main() -> int:
    bench = Benchmark("c4_fabric", "C4P on a real ECMP fabric in network namespaces.", TARGETS)
    if (reason := why_not()) is not None:
        bench.say(f"Skipped. {reason}")
        return bench.finish()
    draws, seconds, mbps = (10, 1.5, 20.0) if bench.quick else (20, 3.0, 40.0)
    lucky: list[Measured] = []
    planned: list[Measured] = []
    with Lab(
        LabShape(link_mbps=mbps), 8, int(mbps * 1e6 / 8 / 10), seed=0, budget_s=110.0 + draws * (2 * seconds + 20)
    ) as lab:
        bench.say("the fabric is up")
        for draw in range(draws):
            arms = [(lab.luck, lucky), (lab.planned, planned)]
            for wire, kept in arms if draw % 2 == 0 else arms[::-1]:
                one = lab.measure(wire, seconds)
                kept.append(one)
                bench.row(what=wire.__name__, draw=draw, busbw_mbps=one.mean_mbps, predicted_mbps=one.predicted_mean_mbps,
                          slowest=min(one.busbw_mbps), fastest=max(one.busbw_mbps))  # fmt: skip
            bench.say(f"draw {draw}: ECMP {lucky[-1].mean_mbps:.1f}, planned {planned[-1].mean_mbps:.1f} Mb/s")
        cut = lab.cut_in_the_middle(0, 1, seconds)
        bench.row(what="after the cut", draw=0, busbw_mbps=cut.after.mean_mbps, predicted_mbps=cut.after.predicted_mean_mbps,
                  slowest=min(cut.after.busbw_mbps), fastest=max(cut.after.busbw_mbps))  # fmt: skip
    ecmp_mean, plan_mean = (float(np.mean([one.mean_mbps for one in arm])) for arm in (lucky, planned))
    ecmp_said, plan_said = (float(np.mean([one.predicted_mean_mbps for one in arm])) for arm in (lucky, planned))
    bench.figure("lab_gain_jobs", plan_mean / ecmp_mean)
    bench.figure("lab_gain_jobs_predicted", plan_said / ecmp_said)
    bench.figure("lab_fraction_of_line_rate", plan_mean / mbps)
    bench.figure("lab_fraction_of_line_rate_predicted", plan_said / mbps)
    bench.figure("lab_after_link_failure_vs_ideal", cut.after.mean_mbps / cut.ideal_mbps)
    bench.figure("lab_after_link_failure_vs_ideal_predicted", cut.after.predicted_mean_mbps / cut.ideal_mbps)
    bench.figure("lab_seconds_to_replan", cut.seconds_to_replan)
    pairs = [(ecmp_mean, ecmp_said), (plan_mean, plan_said), (cut.after.mean_mbps, cut.after.predicted_mean_mbps)]
    bench.figure("lab_prediction_error", max(abs(measured / said - 1) for measured, said in pairs))
    print_rows("c4_fabric", bench.rows)
    return bench.finish()


if __name__ == "__main__":
    raise SystemExit(main())
