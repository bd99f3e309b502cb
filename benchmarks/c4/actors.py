"""The same workers under the real Ray actors: a stopped process is named by the master actor and its generation is fenced off."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from actors.c4.diagnosis.verdict import FaultClass
from actors.c4.generation import Generation, Worker
from actors.c4.injection.faults import Fault, FaultName
from actors.c4.monitors.master import start_master, stop_master
from actors.c4.monitors.settings import MonitorSettings
from actors.cluster.session import RayConfig, ray_session
from benchmarks.c4.training import Job, WorkerSet, training


def on_node(workers: WorkerSet, node_id: str) -> Generation:
    """All workers on one real node."""
    pids = [process.pid or 0 for process in workers.processes]
    return Generation(workers.number, tuple(Worker(rank, node_id, "here", pid) for rank, pid in enumerate(pids)))


def hang_through_actors(rings: Path) -> dict[str, Any]:
    """Stops rank 2: seconds to the verdict, and to the death of all workers of the generation."""
    import ray

    with ray_session(RayConfig(address="local", num_cpus=4, log_to_driver=False, object_store_memory_mib=100)):
        with training("actors", 1, Job(), rings) as workers:
            workers.wait_for_step(1)
            settings = MonitorSettings(injection=True)
            master = start_master(
                "actors", settings, folder=workers.folder, ring_folder=rings, control_folder=workers.control
            )
            try:
                ray.get(master.begin_generation.remote(on_node(workers, ray.get_runtime_context().get_node_id())))
                workers.wait_for_step(40)
                time.sleep(1.0)
                began = time.monotonic()
                ray.get(master.inject.remote(Fault(FaultName.SIGSTOP, 2)))
                found = ray.get(master.verdicts.remote(0, 10.0))
                named_s = time.monotonic() - began
                while any(process.is_alive() for process in workers.processes) and time.monotonic() - began < 20:
                    time.sleep(0.02)
                fenced_s = time.monotonic() - began
                status = ray.get(master.status.remote())
            finally:
                stop_master(master)
    first = found[0].verdict if found else None
    return {
        "fault": "SIGSTOP at rank 2",
        "named": f"{first.kind} {first.culprit}" if first else "nothing",
        "right": first is not None
        and first.fault_class is FaultClass.NON_COMMUNICATION_HANG
        and first.culprit.ranks == (2,),
        "named_s": named_s,
        "all_workers_dead_s": fenced_s,
        "bytes_per_s_per_rank": status.bytes_per_s / max(1, status.world_size),
        "agent_share": max((node.agent_cost_ms_per_s for node in status.nodes), default=0.0) / 1e3,
    }
