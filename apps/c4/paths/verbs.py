"""The verbs `paths` (plan, simulate) and `lab`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from actors.c4.paths.actuators import nccl_environment
from actors.c4.paths.bound import certified_bound
from actors.c4.paths.errors import PathError
from actors.c4.paths.plan import plan_paths
from actors.c4.paths.replan import replan
from actors.c4.paths.routing import EcmpRouter
from actors.c4.paths.simulate import Stage, channel_rates, ecmp_traffic, job_rates, link_use, planned_traffic, run
from actors.c4.paths.topology import PRESETS, Fabric, read_fabric, spec_from
from actors.c4.paths.workload import Connections, paper_jobs, scattered_jobs
from apps.program.errors import UserError

_GIGABITS, _COMPUTE_S, _FAILS_S, _REPLAN_S, _UNTIL_S = 20.0, 0.01, 1.0, 0.3, 2.5


def paths(
    action: Annotated[str, typer.Argument(help="plan: paths and bound; simulate: against ECMP, and a failing link.")],
    fabric: Annotated[str, typer.Option(help=f"A YAML file, or one of: {', '.join(PRESETS)}.")] = "paper",
    queue_pairs: Annotated[int, typer.Option(min=1, max=16, help="Of ECMP's connections.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Draws of ECMP's luck.")] = 20,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[str | None, typer.Option(help="Root of the run folders (default: runs).")] = None,
) -> int:
    """Plan network paths for concurrent jobs, or simulate them against ECMP."""
    if action not in ("plan", "simulate"):
        raise UserError(f"`paths` can plan or simulate, not {action!r}.")
    try:
        place = Path(fabric)
        network = Fabric(spec_from({"preset": fabric})) if fabric in PRESETS else read_fabric(place)
        jobs = paper_jobs(network) if network.spec.nodes == 16 else scattered_jobs(network, seed)
        return (
            _plan(network, jobs, out) if action == "plan" else _simulate(network, jobs, queue_pairs, seeds, seed, out)
        )
    except PathError as error:
        raise UserError(str(error)) from error


def _plan(fabric: Fabric, jobs: Connections, out: str | None) -> int:
    from apps.program.report import print_table
    from apps.program.run_folder import new_run_folder

    began = time.perf_counter()
    plan = plan_paths(fabric, jobs)
    took = time.perf_counter() - began
    bound = certified_bound(fabric, jobs)
    rate = plan.rate(fabric)
    rows = [
        [
            fabric.spec.nics,
            jobs.jobs,
            len(jobs),
            len(plan),
            rate,
            bound.upper_gbps,
            rate / bound.upper_gbps,
            bound.method,
            took,
        ]
    ]
    columns = [
        "GPUs",
        "jobs",
        "connections",
        "flows",
        "rate (Gb/s)",
        "bound (Gb/s)",
        "rate / bound",
        "bound by",
        "seconds",
    ]
    print_table(columns, rows, title="Plan")
    environment = nccl_environment(plan, [f"mlx5_{index}" for index in range(fabric.spec.nics_per_node)])
    folder = new_run_folder("c4", out)
    folder.write_result({"rate_gbps": rate, "bound": bound, "plan_s": took, "nccl": environment, "flows": {
        "connection": plan.flow_connection.tolist(), "src_nic": plan.src_nic.tolist(), "dst_nic": plan.dst_nic.tolist(),
        "bond_port": plan.paths.tx.tolist(), "spine": plan.paths.spine.tolist(), "core": plan.paths.core.tolist(),
        "share": plan.weight.tolist()}})  # fmt: skip
    print(f"Flows: {folder.path / 'result.json'}")
    return 0


def _simulate(fabric: Fabric, jobs: Connections, queue_pairs: int, seeds: int, seed: int, out: str | None) -> int:
    from apps.c4.paths.pictures import failure_figure, job_bandwidth_figure, link_load_figure
    from apps.program.report import Report, print_table
    from apps.program.run_folder import new_run_folder

    plan = plan_paths(fabric, jobs)
    planned = planned_traffic(plan)
    planned_rates = channel_rates(fabric, planned)
    lucky = [ecmp_traffic(fabric, jobs, queue_pairs, seed + draw) for draw in range(seeds)]
    rates = [channel_rates(fabric, traffic) for traffic in lucky]
    mean = np.mean([job_rates(jobs, one) for one in rates], 0)
    by_plan = job_rates(jobs, planned_rates)
    gain = float(by_plan.mean() / mean.mean() - 1)
    leaf, spine = (int(value) for value in np.argwhere(fabric.up_alive)[0])
    broken = fabric.failed(fabric.cable_of(leaf, spine))
    repaired = replan(broken, plan)
    bound = certified_bound(broken, jobs)
    rerouted = planned_traffic(plan, EcmpRouter(broken, seed).route(_flows(fabric, plan, seed)))
    failing = [Stage(0.0, fabric, planned), Stage(_FAILS_S, broken, rerouted)]
    replanned = Stage(_FAILS_S + _REPLAN_S, broken, planned_traffic(repaired.plan))
    runs = [
        ("planned anew", run([*failing, replanned], _GIGABITS, _COMPUTE_S, _UNTIL_S)),
        ("left to the switches", run(failing, _GIGABITS, _COMPUTE_S, _UNTIL_S)),
    ]
    columns = ["", "mean (Gb/s)", "slowest job", "fastest job"]
    rows = [[f"ECMP, {queue_pairs} queue pairs, {seeds} draws", mean.mean(), mean.min(), mean.max()],
            ["planned", by_plan.mean(), by_plan.min(), by_plan.max()]]  # fmt: skip
    print_table(columns, rows, title=f"Bus bandwidth of {jobs.jobs} jobs: {gain:+.1%}")
    folder = new_run_folder("c4", out)
    after = repaired.plan.rate(broken)
    folder.write_result({"gain": gain, "after_failure_gbps": after, "after_failure_bound_gbps": bound.upper_gbps,
                         "flows_moved_fraction": repaired.moved_fraction, "ecmp_gbps": mean.tolist(), "planned_gbps":
                         by_plan.tolist()})  # fmt: skip
    report = Report("C4P: planned paths against ECMP", f"{jobs.jobs} jobs, simulated: {gain:+.1%} bus bandwidth")
    report.add_table("Bus bandwidth", columns, rows)
    uses = [("ECMP", link_use(fabric, lucky[0], rates[0])), ("planned", link_use(fabric, planned, planned_rates))]
    report.add_figure("Load of the uplinks", link_load_figure(fabric, uses), "Before and after planning.")
    report.add_figure("Bandwidth by job", job_bandwidth_figure([("ECMP", mean), ("planned", by_plan)]))
    report.add_figure(
        "A link fails", failure_figure(runs, _FAILS_S, bound.upper_gbps),
        f"{fabric.name(fabric.cable_of(leaf, spine)[0])} fails; {repaired.moved_fraction:.1%} of the flows move.",
    )  # fmt: skip
    print(f"Report: {report.write(folder)}")
    return 0


def _flows(fabric: Fabric, plan, seed: int):
    """The plan's flows with ports that take its paths while all is well."""
    from actors.c4.paths.probing import SimulatedNetwork, find_ports
    from actors.c4.paths.routing import Flows

    network = SimulatedNetwork(fabric, EcmpRouter(fabric, seed), seed)
    return Flows(plan.src_nic, plan.dst_nic, find_ports(network, plan, seed).source_port, plan.paths.tx)


def lab(
    jobs: Annotated[int, typer.Option(min=1, max=16, help="Ring all-reduces at once, two ranks each.")] = 8,
    draws: Annotated[int, typer.Option(min=1, max=100, help="Draws of ECMP's luck, each beside a plan.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.5, max=30, help="Of each measurement.")] = 2.0,
    mbps: Annotated[float, typer.Option(min=5, max=1000, help="Rate of every link.")] = 20.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[str | None, typer.Option(help="Root of the run folders (default: runs).")] = None,
) -> int:
    """Build an ECMP fabric in network namespaces and run all-reduces on it: by luck, by plan, and with a cable cut."""
    import signal
    import sys

    from apps.c4.paths.fabric import LabShape, why_not
    from apps.c4.paths.lab import Lab
    from apps.c4.paths.pictures import job_bandwidth_figure
    from apps.program.report import Report, print_table
    from apps.program.run_folder import new_run_folder

    if (reason := why_not()) is not None:
        print(f"Skipped. {reason}")
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the fabric is taken down
    rows = []
    budget_s = 180.0 + draws * (2 * seconds + 20)
    try:
        with Lab(LabShape(link_mbps=mbps), jobs, int(mbps * 1e6 / 8 / 5), seed, budget_s) as bench:
            for draw in range(draws):
                lucky, planned = bench.measure(bench.luck, seconds), bench.measure(bench.planned, seconds)
                for label, one in (("ECMP", lucky), ("planned", planned)):
                    rows.append(
                        [
                            f"{label}, draw {draw}",
                            one.mean_mbps,
                            one.predicted_mean_mbps,
                            min(one.busbw_mbps),
                            max(one.busbw_mbps),
                        ]
                    )
            cut = bench.cut_in_the_middle(0, 1, seconds)
    except PathError as error:
        raise UserError(str(error)) from error
    rows.append(
        [
            "cable cut, planned anew",
            cut.after.mean_mbps,
            cut.after.predicted_mean_mbps,
            min(cut.after.busbw_mbps),
            max(cut.after.busbw_mbps),
        ]
    )
    columns = ["", "mean (Mb/s)", "simulator says", "slowest job", "fastest job"]
    print_table(columns, rows, title=f"Bus bandwidth of {jobs} jobs on links of {mbps:g} Mb/s")
    share = cut.after.mean_mbps / cut.ideal_mbps
    print(f"After the cut: {share:.1%} of the ideal; planned anew after {cut.seconds_to_replan:.1f} s")
    folder = new_run_folder("c4", out)
    folder.write_result({"rows": rows, "cut": cut, "lucky": lucky, "planned": planned})
    report = Report("C4P: the fabric lab", f"{jobs} jobs on Linux's own ECMP")
    report.add_table("Bus bandwidth", columns, rows)
    bars = [
        ("ECMP", np.array(lucky.busbw_mbps)),
        ("planned", np.array(planned.busbw_mbps)),
        ("after the cut", np.array(cut.after.busbw_mbps)),
    ]
    report.add_figure("Bandwidth by job", job_bandwidth_figure(bars, "Mb/s"), "The last draw.")
    print(f"Report: {report.write(folder)}")
    return 0
