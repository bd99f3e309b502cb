"""The namespace fabric: real ECMP by source port, real rates, and nothing left behind. Skips where the privileges are missing."""

from __future__ import annotations

import subprocess

import pytest

from actors.c4.paths.errors import FabricError
from apps.c4.paths.fabric import LabShape, NamespaceFabric, leftovers, why_not
from apps.c4.paths.lab import Lab

SMALL = LabShape(hosts_per_group=2, spines=4, link_mbps=20, addresses=2)
REASON = why_not()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def namespaces() -> set[str]:
    return set(subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split())


def spines(fabric: NamespaceFabric, host: int, target: str, port: int, ports: range) -> list[int | None]:
    """Spine by source port; asked again while a probe was lost (on a busy machine, or while routes change)."""
    found: list[int | None] = list(fabric.trace(host, target, port, ports))
    for _ in range(5):
        if None not in found:
            break
        again = fabric.trace(host, target, port, ports)
        found = [new if old is None else old for old, new in zip(found, again, strict=True)]
    return found


@needs_namespaces
def test_the_source_port_decides_the_spine_and_a_cut_cable_is_avoided():
    fabric = NamespaceFabric(SMALL)
    with fabric:
        target, ports = fabric.address(2, 0, 1), range(50_000, 50_040)
        first = spines(fabric, 0, target, 20_001, ports)
        assert set(first) == {0, 1, 2, 3}, "all spines are reached by some port"
        assert spines(fabric, 0, target, 20_001, ports) == first, "a port always takes the same spine"
        assert spines(fabric, 0, target, 20_002, ports) != first, "the destination port is part of the hash"
        fabric.fail(0, 2)
        assert set(spines(fabric, 0, target, 20_001, ports)) == {0, 1, 3}
        back = spines(fabric, 2, fabric.address(0, 0, 1), 20_001, ports)
        assert 2 not in back, "the other side does not send into the dead cable either"
    assert not namespaces() & set(fabric.namespaces)


@needs_namespaces
def test_everything_is_torn_down_when_the_run_fails_in_the_middle():
    fabric = NamespaceFabric(SMALL)
    with pytest.raises(RuntimeError, match="in the middle"), fabric:
        raise RuntimeError("in the middle")
    assert not namespaces() & set(fabric.namespaces)
    assert leftovers() == []


@needs_namespaces
@pytest.mark.slow
@pytest.mark.timeout(170)
def test_all_reduces_run_over_the_planned_spines_at_line_rate():
    with Lab(SMALL, jobs=4, operation_bytes=200_000, seed=1, budget_s=150) as lab:
        planned = lab.measure(lab.planned, 1.5)
    # each job alone on its links: a plan that shared one would halve a job's rate, so this is no matter of timing
    assert planned.predicted_mean_mbps == pytest.approx(SMALL.spec().port_gbps)
    assert planned.mean_mbps > 0.6 * SMALL.link_mbps
    assert not namespaces() & set(lab.network.namespaces)


@pytest.mark.parametrize("shape", [LabShape(hosts_per_group=0), LabShape(spines=1), LabShape(addresses=0)])
def test_impossible_shapes_are_refused(shape):
    with pytest.raises(FabricError):
        NamespaceFabric(shape)
