"""Rings, trees, parallel groups, and SimAI's workload."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.c4.paths.errors import PathError
from actors.c4.paths.simai import read_simai
from actors.c4.paths.topology import Fabric, paper_testbed
from actors.c4.paths.workload import job_connections, parallel_job, ring_edges, scattered_jobs, tree_edges


@given(st.integers(2, 40))
def test_rings_pass_every_member_once_and_trees_connect_all(count):
    ring = nx.DiGraph([(a, b) for a, b, _ in ring_edges(range(count))])
    assert len(nx.find_cycle(ring)) == count
    tree = nx.DiGraph([(a, b) for a, b, _ in tree_edges(range(count))])
    assert nx.is_strongly_connected(tree) and tree.number_of_nodes() == count
    # each of two trees has n - 1 edges, both ways, with half of the data; a bus bandwidth of 1 is n / (2 (n - 1)) of the data
    assert sum(demand for _, _, demand in tree_edges(range(count))) == pytest.approx(
        2 * (count - 1) * count / (2 * (count - 1))
    )


def test_a_job_has_a_channel_for_each_nic():
    fabric = Fabric(paper_testbed())
    connections = job_connections(fabric, (0, 3, 9))
    assert (connections.channels, len(connections), connections.jobs) == (8, 24, 1)
    assert (connections.src_nic % 8 == connections.dst_nic % 8).all()
    with pytest.raises(PathError, match="different numbers"):
        job_connections(fabric, (1, 1))


def test_parallel_groups_follow_megatrons_order():
    """TP 4 x PP 2 x DP 4 on four nodes of eight: TP stays in a node, DP crosses, stages are two nodes apart."""
    fabric = Fabric(paper_testbed())
    nodes = (0, 1, 2, 3)
    assert len(parallel_job(fabric, nodes, 4, 2, 4, {"tp": "ring"})) == 0
    dp = parallel_job(fabric, nodes, 4, 2, 4, {"dp": "ring"})
    # ranks 0, 4, 8, 12 are one DP group: 0 and 4 share a node, so two of its four connections leave it
    mine = sorted(zip(dp.src_nic[dp.channel == 0].tolist(), dp.dst_nic[dp.channel == 0].tolist(), strict=True))
    assert mine == [(4, 8), (12, 0)]
    pp = parallel_job(fabric, nodes, 4, 2, 4, {"pp": "chain"})
    assert set(zip(pp.src_nic.tolist(), pp.dst_nic.tolist(), strict=True)) == {
        pair for rank in range(16) for pair in ((rank, rank + 16), (rank + 16, rank))
    }
    with pytest.raises(PathError, match="are not the 32 GPUs"):
        parallel_job(fabric, nodes, 4, 2, 2, {"dp": "ring"})


def test_scattered_jobs_share_no_node_and_are_seeded():
    fabric = Fabric(paper_testbed())
    one, two = scattered_jobs(fabric, 3), scattered_jobs(fabric, 3)
    np.testing.assert_array_equal(one.src_nic, two.src_nic)
    owners: dict[int, set[int]] = {}
    for nic, channel in zip(one.src_nic, one.channel, strict=True):
        owners.setdefault(int(nic) // 8, set()).add(int(one.channel_job[channel]))
    assert all(len(jobs) == 1 for jobs in owners.values())


@pytest.mark.shared_data
def test_simais_workload_states_its_shape_and_bytes(shared_data):
    workload = read_simai(shared_data / "collectives" / "simai" / "workload_analytical.txt")
    assert (workload.gpus, workload.tp, workload.pp, workload.ep, workload.dp) == (9216, 2, 12, 16, 384)
    # the optimizer's gradients, read off the file by hand
    assert workload.group_bytes["dp_ep"] == 19327352832 + 38654705664
    assert workload.group_bytes["dp"] >= 2807758848 + 5615517696


def test_a_file_that_is_none_is_said(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text("hello\n")
    with pytest.raises(PathError, match="does not state"):
        read_simai(file)
