"""The flow simulator: hand-worked runs, failures in time, and an independent per-flow implementation."""

from __future__ import annotations

import numpy as np
import pytest

from actors.c4.paths.errors import PathError
from actors.c4.paths.plan import plan_paths
from actors.c4.paths.simulate import (
    Stage,
    channel_rates,
    ecmp_traffic,
    job_rates,
    link_use,
    planned_traffic,
    run,
)
from actors.c4.paths.topology import ClosSpec, Fabric, paper_testbed
from actors.c4.paths.workload import job_connections, joined, paper_jobs

TINY = ClosSpec(
    nodes=4, nics_per_node=1, rails=1, nodes_per_group=2, spines=2, port_gbps=10, uplink_gbps=10, nic_cap_gbps=20
)


def test_elastic_rates_equal_those_of_an_independent_loop():
    """Progressive filling flow by flow in plain Python over the same paths."""
    fabric = Fabric(paper_testbed())
    connections = paper_jobs(fabric)
    traffic = ecmp_traffic(fabric, connections, 2, 7)
    paths = [[int(link) for link in row if link >= 0] for row in traffic.links(fabric)]
    left = dict(enumerate(fabric.capacity.tolist()))
    rate, open_flows = [0.0] * len(paths), set(range(len(paths)))
    while open_flows:
        users: dict[int, list[int]] = {}
        for flow in open_flows:
            for link in paths[flow]:
                users.setdefault(link, []).append(flow)
        tight = min(users, key=lambda link: left[link] / len(users[link]))
        share = left[tight] / len(users[tight])
        for flow in users[tight]:
            rate[flow] = share
            for link in paths[flow]:
                left[link] -= share
        open_flows -= set(users[tight])
    total = np.bincount(traffic.flow_connection, rate)
    wanted = [min(total[connections.channel == channel]) for channel in range(connections.channels)]
    np.testing.assert_allclose(channel_rates(fabric, traffic), wanted, rtol=1e-9)


def test_a_job_alone_runs_at_line_rate_and_operations_repeat():
    fabric = Fabric(TINY)
    plan = plan_paths(fabric, job_connections(fabric, (0, 2)))
    done = run([Stage(0.0, fabric, planned_traffic(plan))], channel_gigabits=10.0, compute_s=0.5, until_s=3.1)
    assert [t for o in done for t in (o.began_s, o.ended_s)] == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5])
    assert all(o.busbw_gbps == pytest.approx(20) for o in done)


def test_two_jobs_that_share_a_link_slow_each_other_until_one_is_done():
    """Both ends of the ring's connections meet in NIC 0: 20 Gb/s for two; the other goes on alone at 20 when the first ends."""
    fabric = Fabric(TINY)
    connections = joined([job_connections(fabric, (0, 2)), job_connections(fabric, (0, 3))])
    plan = plan_paths(fabric, connections)
    done = run([Stage(0.0, fabric, planned_traffic(plan))], channel_gigabits=10.0, compute_s=9.0, until_s=2.0)
    assert [o.ended_s for o in done] == pytest.approx([1.0, 1.0])


def test_a_failure_in_the_middle_slows_the_operation_by_hand():
    """20 Gb/s for 0.25 s move 5 of 10 gigabits; with one of two ports dead the other 5 take 0.5 s."""
    fabric = Fabric(TINY)
    connections = job_connections(fabric, (0, 2))
    before = planned_traffic(plan_paths(fabric, connections))
    broken = fabric.failed([int(fabric.host_up(0, 0)), int(fabric.host_down(0, 0))])
    after = planned_traffic(plan_paths(broken, connections))
    done = run([Stage(0.0, fabric, before), Stage(0.25, broken, after)], 10.0, 9.0, 5.0)
    assert [o.ended_s for o in done] == pytest.approx([0.75])


def test_traffic_on_a_dead_link_stands_still():
    fabric = Fabric(TINY)
    plan = plan_paths(fabric, job_connections(fabric, (0, 2)))
    broken = fabric.failed([int(fabric.host_up(0, 0))])
    assert run([Stage(0.0, broken, planned_traffic(plan))], 10.0, 0.1, 5.0) == ()


def test_planning_beats_luck_and_luck_is_seeded():
    fabric = Fabric(paper_testbed())
    connections = paper_jobs(fabric)
    planned = job_rates(connections, channel_rates(fabric, planned_traffic(plan_paths(fabric, connections))))
    luck = [
        job_rates(connections, channel_rates(fabric, ecmp_traffic(fabric, connections, 4, seed))) for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(luck[0], luck[1])
    assert not np.array_equal(luck[0], luck[2])
    assert (planned > luck[0]).all()


def test_links_are_never_used_above_capacity():
    fabric = Fabric(paper_testbed())
    traffic = planned_traffic(plan_paths(fabric, paper_jobs(fabric)))
    assert link_use(fabric, traffic, channel_rates(fabric, traffic)).max() <= 1 + 1e-9


def test_stages_out_of_order_are_refused():
    fabric = Fabric(TINY)
    traffic = planned_traffic(plan_paths(fabric, job_connections(fabric, (0, 2))))
    with pytest.raises(PathError, match="order of time"):
        run([Stage(1.0, fabric, traffic)], 1.0, 0.0, 1.0)
