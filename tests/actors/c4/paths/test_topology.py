"""Fabrics: numbering, capacities, failures, descriptions; paths checked against networkx's own search."""

from __future__ import annotations

import itertools

import networkx as nx
import numpy as np
import pytest

from actors.c4.paths.errors import PathError, UnreachableError
from actors.c4.paths.routing import EcmpRouter, Flows, links_of
from actors.c4.paths.topology import ClosSpec, Fabric, paper_testbed, pod_fabric, read_fabric, spec_from, with_failures

SMALL3 = ClosSpec(
    nodes=8, nics_per_node=2, rails=2, nodes_per_group=2, spines=2, groups_per_pod=2, cores_per_spine=2, core_gbps=400
)


def random_flows(fabric: Fabric, count: int, seed: int) -> Flows:
    rng = np.random.default_rng(seed)
    src = rng.integers(0, fabric.spec.nics, count)
    dst = (src + rng.integers(1, fabric.spec.nics, count)) % fabric.spec.nics
    return Flows(src, dst, rng.integers(49152, 65536, count), rng.integers(0, 2, count))


def test_the_papers_testbed_has_eight_uplinks_a_leaf_and_no_oversubscription():
    spec = paper_testbed()
    assert (spec.nics, spec.leaves, spec.spines, spec.oversubscription) == (128, 32, 8, 1.0)
    assert spec.oversubscribed(2).oversubscription == 2.0
    assert pod_fabric(10_000).nics == 10_240 and pod_fabric(10_000).oversubscription == 1.0


@pytest.mark.parametrize("spec", [paper_testbed(), SMALL3], ids=["two tiers", "three tiers"])
def test_link_numbers_are_a_bijection_of_named_directed_links(spec):
    fabric = Fabric(spec)
    names = [fabric.name(link) for link in range(fabric.links)]
    assert len(set(names)) == fabric.links
    graph = fabric.graph()
    assert graph.number_of_edges() == fabric.links
    for name in names:
        source, destination = name.split(" -> ")
        assert graph.has_edge(destination, source), "every cable has both directions"


@pytest.mark.parametrize("hashing", ["resilient", "modulo"])
@pytest.mark.parametrize("spec", [paper_testbed(), SMALL3], ids=["two tiers", "three tiers"])
def test_every_routed_path_is_a_shortest_path_of_the_graph(spec, hashing):
    fabric = Fabric(spec).failed(Fabric(spec).cable_of(0, 1))
    flows = random_flows(fabric, 60, 1)
    links = links_of(fabric, flows.src_nic, flows.dst_nic, EcmpRouter(fabric, 5, hashing).route(flows))
    graph = fabric.graph()
    for flow, row in enumerate(links):
        hops = [fabric.name(int(link)).split(" -> ") for link in (row[6], *row[:6], row[7]) if link >= 0]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(hops)), "the links follow one another"
        assert all(graph.has_edge(*hop) for hop in hops), "all are up"
        assert len(hops) == nx.shortest_path_length(graph, hops[0][0], hops[-1][1])
        node, index = divmod(int(flows.src_nic[flow]), spec.nics_per_node)
        assert hops[0][0] == f"node{node}/gpu{index}"


def test_hashing_is_even_seeded_and_per_switch():
    fabric = Fabric(paper_testbed())
    ports = np.arange(49152, 65536)
    full = np.ones(len(ports), np.int64)
    flows = Flows(0 * full, 64 * full, ports, 0 * full)
    paths = EcmpRouter(fabric, 1).route(flows)
    counts = np.bincount(paths.spine * 2 + paths.rx, minlength=16)
    assert abs(counts - len(ports) / 16).max() < 6 * np.sqrt(len(ports) / 16), "sixteen paths, equally likely"
    assert EcmpRouter(fabric, 1).route(flows).same(paths).all()
    other = EcmpRouter(fabric, 2).route(flows)
    assert abs((other.spine == paths.spine).mean() - 1 / 8) < 0.02
    right = EcmpRouter(fabric, 1).route(flows.with_ports(ports, full))
    assert abs((right.spine == paths.spine).mean() - 1 / 8) < 0.02, "another leaf hashes with another seed"


def test_resilient_hashing_moves_only_flows_that_lost_their_next_hop():
    fabric = Fabric(paper_testbed())
    flows = random_flows(fabric, 4000, 2)
    router = EcmpRouter(fabric, 3)
    before = router.route(flows)
    broken = fabric.failed(fabric.links_of_spine(0, 4))
    after = router.on(broken).route(flows)
    assert (after.same(before) | (before.spine == 4)).all()
    assert not (after.spine == 4).any()
    modulo = EcmpRouter(broken, 3, "modulo").route(flows)
    assert (~modulo.same(before) & (before.spine != 4) & (before.spine >= 0)).sum() > 1000


def test_a_dead_leaf_moves_traffic_to_the_other_port_and_two_dead_leaves_cut_off():
    fabric = with_failures(Fabric(paper_testbed()), [{"leaf": 0}])
    flows = Flows(np.array([0]), np.array([64]), np.array([50000]), np.array([0]))
    assert EcmpRouter(fabric, 0).route(flows).tx[0] == 1
    with pytest.raises(UnreachableError):
        EcmpRouter(with_failures(fabric, [{"leaf": 1}]), 0).route(flows)


def test_descriptions_from_yaml(tmp_path):
    file = tmp_path / "fabric.yaml"
    file.write_text("preset: paper\noversubscription: 2\nfailed:\n  - {leaf: 0, spine: 1}\n  - {pod: 0, spine: 3}\n")
    fabric = read_fabric(file)
    assert fabric.spec.spines == 4
    assert not fabric.up_alive[0, 1] and not fabric.down_alive[:, 3].any() and fabric.up_alive[1, 1]


@pytest.mark.parametrize(
    ("description", "sentence"),
    [({"nodes": 4, "colour": 1}, "has no 'colour'"), ({"nodes": "4"}, "must be a whole number"), ({}, "needs a preset"),
     ({"nodes": 4, "nodes_per_group": 3}, "whole number of groups"), ({"preset": "moon"}, "no fabric preset"),
     ({"preset": "paper", "oversubscription": 3}, "cannot be cut"), ({"nodes": 8, "groups_per_pod": 1}, "cores_per_spine")],
)  # fmt: skip
def test_impossible_descriptions_are_refused_with_a_sentence(description, sentence):
    with pytest.raises(PathError, match=sentence):
        spec_from(description)
