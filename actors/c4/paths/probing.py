"""Learning which source port takes which path, by probes alone: nothing here knows a hash, a seed or a table.

Two ways. ``find_ports`` traces (TTL-limited packets whose expiry a switch reports) until each planned flow has a port with
the wanted
path. ``learn_classes``, ``classify`` and ``align`` need no answer of any switch: two streams out of different NICs slow
each other
down exactly when they share a link, so ports fall into classes, one class a spine; the receiver itself sees by which port
they came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from actors.c4.paths.errors import PathError
from actors.c4.paths.plan import Plan
from actors.c4.paths.routing import FIRST_SOURCE_PORT, SOURCE_PORTS, EcmpRouter, Flows, Paths, links_of
from actors.c4.paths.topology import Bools, Fabric, Floats, Ints


class Network(Protocol):
    """What a prober may do. Flows are real packets: the answers may be lost or wrong."""

    def trace(self, flows: Flows) -> tuple[Paths, Bools]:
        """(paths as the switches report them, [F] whether an answer came)."""
        ...

    def slowdown(self, first: Flows, second: Flows) -> Floats:
        """[F]: rate of each ``first`` flow alone over its rate beside its ``second``; about 1 when they share nothing."""
        ...

    def arrival(self, flows: Flows) -> Ints:
        """[F]: the receiver's bond port by which packets arrive."""
        ...


class SimulatedNetwork:
    """Probes in the simulated fabric, with lost answers, stale answers and noisy rates."""

    def __init__(
        self,
        fabric: Fabric,
        router: EcmpRouter,
        seed: int,
        loss: float = 0.02,
        wrong: float = 0.005,
        noise: float = 0.08,
    ):
        """``loss``, ``wrong``: share of traces without answer, with another switch's; ``noise``: relative, of a rate."""
        self._fabric, self._router = fabric, router
        self._rng = np.random.default_rng(seed)
        self._loss, self._wrong, self._noise = loss, wrong, noise
        self.probes = 0

    def trace(self, flows: Flows) -> tuple[Paths, Bools]:
        self.probes += len(flows)
        paths = self._router.route(flows)
        mistaken = self._rng.random(len(flows)) < self._wrong
        other = self._rng.integers(0, self._fabric.spec.spines, len(flows))
        spine = np.where(mistaken & (paths.spine >= 0), other, paths.spine)
        return Paths(paths.tx, spine, paths.core, paths.rx), self._rng.random(len(flows)) >= self._loss

    def slowdown(self, first: Flows, second: Flows) -> Floats:
        self.probes += 2 * len(first)
        mine, yours = (
            links_of(self._fabric, flows.src_nic, flows.dst_nic, self._router.route(flows)) for flows in (first, second)
        )
        shared = ((mine[:, :, None] == yours[:, None, :]) & (mine[:, :, None] >= 0)).any((1, 2))
        noise = 1 + self._noise * self._rng.standard_normal((2, len(first)))
        return np.where(shared, 2.0, 1.0) * noise[0] / np.maximum(noise[1], 0.1)

    def arrival(self, flows: Flows) -> Ints:
        self.probes += len(flows)
        return self._router.route(flows).rx


@dataclass(frozen=True)
class FoundPorts:
    """A source port for every flow of a plan."""

    source_port: Ints
    found: Bools
    """[F]: twice traced on the wanted path; else the port is any."""
    probes: int


def find_ports(network: Network, plan: Plan, seed: int = 0, tries: int = 4096, batch: int = 16) -> FoundPorts:
    """Traces random ports until each flow has one on its planned path, confirmed by a second trace.

    Args:
        tries: ports a flow at most.
        batch: ports a flow traced at once.
    """
    rng = np.random.default_rng(seed)
    count = len(plan)
    source_port = FIRST_SOURCE_PORT + rng.integers(0, SOURCE_PORTS, count)
    found = np.zeros(count, bool)
    probes = 0
    src, dst, want = plan.src_nic, plan.dst_nic, plan.paths
    for _ in range(-(-tries // batch)):
        open_flows = np.flatnonzero(~found)
        if not len(open_flows):
            break
        who = np.repeat(open_flows, batch)
        ports = FIRST_SOURCE_PORT + rng.integers(0, SOURCE_PORTS, len(who))
        flows = Flows(src[who], dst[who], ports, want.tx[who])
        seen, answered = network.trace(flows)
        probes += len(who)
        hit = np.flatnonzero(answered & seen.same(want.only(who)))
        # one candidate a flow is confirmed in each round
        _, first = np.unique(who[hit], return_index=True)
        hit = hit[first]
        again, answered = network.trace(flows.only(hit))
        probes += len(hit)
        sure = hit[answered & again.same(want.only(who[hit]))]
        source_port[who[sure]] = ports[sure]
        found[who[sure]] = True
    return FoundPorts(source_port, found, probes)


@dataclass(frozen=True)
class Anchors:
    """Streams out of one leaf, one for each class of ports: whatever else leaves this leaf is compared with them."""

    flows: Flows
    """[classes]"""

    def __len__(self) -> int:
        return len(self.flows)


def shares_link(network: Network, first: Flows, second: Flows, votes: int = 3) -> Bools:
    """[F]: the pairs share a link: median of ``votes`` measurements against the geometric middle of 1 and 2."""
    ratios = np.stack([network.slowdown(first, second) for _ in range(votes)])
    return np.asarray(np.median(ratios, 0) > np.sqrt(2.0))


def learn_classes(
    network: Network, first: tuple[int, int, int], second: tuple[int, int, int], ports: int, seed: int = 0
) -> tuple[Anchors, Ints, Ints]:
    """Finds the classes of ports out of one leaf.

    Ports of one NIC cannot be compared with one another (they share the NIC), so those of two pairs of NICs are: the graph of who
    slows whom falls into one connected part for each spine.

    Args:
        first, second: (source NIC, destination NIC, bond port) of two pairs that share both racks and no NIC.
        ports: tried of each pair; about four for each path.

    Returns:
        anchors (streams of ``second``), tried ports of ``first`` [ports], class of each [ports], -1 where nothing collided.
    """
    rng = np.random.default_rng(seed)
    tried = FIRST_SOURCE_PORT + rng.choice(SOURCE_PORTS, (2, ports), replace=False)
    x, y = (grid.ravel() for grid in np.meshgrid(np.arange(ports), np.arange(ports), indexing="ij"))
    hits = shares_link(network, _flows(first, tried[0][x]), _flows(second, tried[1][y])).reshape(ports, ports)
    # ports of the second pair belong together when they hit the same ports of the first: rows agree but for noise
    columns = hits.T.astype(float)
    group = np.full(ports, -1)
    centres: list[int] = []
    for place in range(ports):
        if not columns[place].any():
            continue
        for number, centre in enumerate(centres):
            both = float(columns[place] @ columns[centre])
            if both > 0.5 * max(columns[place].sum(), columns[centre].sum()):
                group[place] = number
                break
        else:
            group[place] = len(centres)
            centres.append(place)
    if not centres:
        raise PathError("No two probes slowed each other down: are the two pairs of NICs on the same leaves?")
    anchors = Anchors(_flows(second, tried[1][centres]))
    votes = np.stack([hits[:, group == number].mean(1) for number in range(len(centres))], 1)
    classes = np.where(votes.max(1) > 0.5, votes.argmax(1), -1)
    return anchors, tried[0], classes


def classify(network: Network, flows: Flows, anchors: Anchors, votes: int = 3) -> Ints:
    """[F]: the class of each flow out of the anchors' leaf, -1 where no anchor (or more than one) is slowed down."""
    count, classes = len(flows), len(anchors)
    who, which = (grid.ravel() for grid in np.meshgrid(np.arange(count), np.arange(classes), indexing="ij"))
    hit = shares_link(network, flows.only(who), anchors.flows.only(which), votes).reshape(count, classes)
    # a doubtful answer is asked again, with more votes
    doubtful = np.flatnonzero(hit.sum(1) != 1)
    if len(doubtful):
        who, which = (grid.ravel() for grid in np.meshgrid(doubtful, np.arange(classes), indexing="ij"))
        again = shares_link(network, flows.only(who), anchors.flows.only(which), 3 * votes)
        hit[doubtful] = again.reshape(len(doubtful), classes)
    return np.where(hit.sum(1) == 1, hit.argmax(1), -1)


def align(network: Network, known: Anchors, other: Anchors) -> Ints:
    """[classes of other]: which class of ``known`` is the same spine, -1 where none; both must end at one leaf, at
    different NICs.

    Streams from different leaves meet only on the link from the spine down, so anchors must arrive by the same bond port.
    """
    return classify(network, other.flows, known, votes=5)


def arriving_by(network: Network, flows: Flows, port: int) -> Flows:
    """Those flows that the receiver sees at this bond port."""
    return flows.only(network.arrival(flows) == port)


def _flows(pair: tuple[int, int, int], ports: Sequence[int] | Ints) -> Flows:
    ports = np.asarray(ports, np.int64)
    source, target, tx = (np.full(len(ports), value, np.int64) for value in pair)
    return Flows(source, target, ports, tx)
