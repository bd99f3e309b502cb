"""Blind probing against the routes that only the simulated switches know; orders and the master."""

from __future__ import annotations

import numpy as np
import pytest

from actors.c4.paths.actuators import (
    LinuxActuator,
    Order,
    QueuePair,
    RoceActuator,
    SimulatorActuator,
    nccl_environment,
    put_into_force,
)
from actors.c4.paths.errors import PathError
from actors.c4.paths.plan import plan_paths
from actors.c4.paths.probing import SimulatedNetwork, classify, learn_classes
from actors.c4.paths.routing import EcmpRouter, Flows
from actors.c4.paths.service import PathMaster
from actors.c4.paths.simulate import channel_rates
from actors.c4.paths.topology import Fabric, paper_testbed
from actors.c4.paths.workload import job_connections, paper_jobs

FABRIC = Fabric(paper_testbed())


@pytest.mark.parametrize("seed", [0, 1])
def test_ports_fall_into_classes_that_are_the_spines(seed):
    router = EcmpRouter(FABRIC, seed)
    network = SimulatedNetwork(FABRIC, router, seed)
    anchors, _, classes = learn_classes(network, (0, 64, 0), (8, 72, 0), 48, seed)
    assert len(anchors) == 8 and (classes >= 0).mean() > 0.95
    spine_of = router.route(anchors.flows).spine
    assert sorted(spine_of) == list(range(8)), "one class a spine"
    ports = np.arange(50000, 50300)
    full = np.ones(300, np.int64)
    flows = Flows(full * 32, full * 96, ports, full * 0)  # NICs that never took part
    found = classify(network, flows, anchors)
    assert (np.where(found >= 0, spine_of[found], -1) == router.route(flows).spine).mean() >= 0.99


def test_streams_that_never_meet_teach_nothing():
    network = SimulatedNetwork(FABRIC, EcmpRouter(FABRIC, 0), 0)
    with pytest.raises(PathError, match="same leaves"):
        learn_classes(network, (0, 64, 0), (1, 65, 0), 12)


def test_orders_found_by_probing_take_the_planned_paths_through_the_switches():
    router = EcmpRouter(FABRIC, 4)
    plan = plan_paths(FABRIC, paper_jobs(FABRIC))
    actuator = SimulatorActuator(router)
    found = put_into_force(SimulatedNetwork(FABRIC, router, 0), plan, actuator)
    assert found.found.all()
    traffic = actuator.traffic(plan)
    assert traffic.paths.same(plan.paths).mean() >= 0.999
    assert channel_rates(FABRIC, traffic).mean() >= 0.99 * plan.rate(FABRIC)


def test_the_master_answers_per_connection_and_replans_with_few_moves():
    router = EcmpRouter(FABRIC, 2)
    master = PathMaster(FABRIC, SimulatedNetwork(FABRIC, router, 0))
    for node in range(8):
        master.register(f"job{node}", job_connections(FABRIC, (node, node + 8)))
    with pytest.raises(PathError, match="registered already"):
        master.register("job3", job_connections(FABRIC, (3, 11)))
    pairs = master.queue_pairs("job3", 0)
    assert sum(order.share for order in pairs) == pytest.approx(1) and {order.bond_port for order in pairs} == {0, 1}
    assert master.standing().rate_gbps == pytest.approx(362)

    before = {(order.src_nic, order.dst_nic, order.source_port) for order in master.orders}
    broken = FABRIC.failed(FABRIC.links_of_spine(0, 5))
    standing = master.network_changed(broken, SimulatedNetwork(broken, router.on(broken), 1))
    assert standing.rate_gbps >= 0.99 * standing.bound.upper_gbps and standing.moved_fraction <= 0.15
    after = {(order.src_nic, order.dst_nic, order.source_port) for order in master.orders}
    assert len(after - before) <= 0.15 * len(after), "who did not move keeps its port"

    master.release("job0")
    assert master.plan.connections.jobs == 7 and len(master.queue_pairs("job7", 15)) == 4
    with pytest.raises(PathError, match="not registered"):
        master.queue_pairs("job0", 0)


def test_reported_times_shift_shares():
    master = PathMaster(FABRIC, SimulatedNetwork(FABRIC, EcmpRouter(FABRIC, 0), 0))
    master.register("a", job_connections(FABRIC, (0, 8)))
    count = len(master.queue_pairs("a", 0))
    master.completed("a", {0: (4.0, *([1.0] * (count - 1)))})
    shares = [order.share for order in master.queue_pairs("a", 0)]
    assert shares[0] < min(shares[1:]) and sum(shares) == pytest.approx(1)
    with pytest.raises(PathError, match="queue pairs, not 1"):
        master.completed("a", {0: (1.0,)})


def test_linux_hook_gives_planned_ports_and_any_port_else():
    actuator = LinuxActuator({0: 10, 1: 20, 2: 30})
    actuator.apply([Order(0, 10, 20, 50123, 0, 1.0)])
    assert actuator.source_port(0, 1) == 50123 and actuator.source_port(1, 2) is None
    with pytest.raises(PathError, match="Rank 9 has no NIC"):
        actuator.source_port(0, 9)


def test_roce_dry_run_says_what_it_would_do_and_refuses_foreign_ports():
    said: list[str] = []
    actuator = RoceActuator(lambda order: [QueuePair(None, 77)], dry_run=True, say=said.append)
    actuator.apply([Order(0, 1, 2, 50123, 1, 1.0)])
    assert said == ["would set UDP source port 50123 and bond port 2 of queue pair 77 (NIC 1 -> 2)"]
    with pytest.raises(PathError, match="no RoCE v2 source port"):
        actuator.apply([Order(0, 1, 2, 4791, 0, 1.0)])
    with pytest.raises(PathError, match="pyverbs"):
        RoceActuator(lambda order: [QueuePair(None, 77)]).apply([Order(0, 1, 2, 50123, 1, 1.0)])


def test_nccls_environment_states_the_number_of_queue_pairs():
    plan = plan_paths(FABRIC, job_connections(FABRIC, (0, 8)))
    environment = nccl_environment(plan, ["mlx5_0", "mlx5_1"])
    assert environment["NCCL_IB_QPS_PER_CONNECTION"] == "4" and environment["NCCL_IB_HCA"] == "=mlx5_0,mlx5_1"
