"""Which path a flow takes: ECMP by per-switch seeded hashes of the 5-tuple, and paths as rows of link numbers.

A flow is one queue pair (or TCP connection): the source port is the only part of its 5-tuple that a planner may choose. The bond
port by which it leaves (``tx``) is the sender's choice; the port at which it arrives (``rx``) is the last spine's, by hash.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from actors.c4.paths.errors import UnreachableError
from actors.c4.paths.topology import Bools, Fabric, Ints

ROCE_PORT = 4791
FIRST_SOURCE_PORT, SOURCE_PORTS = 0xC000, 0x4000
"""RoCE v2 source ports are taken from 0xC000 to 0xFFFF."""
Hashing = Literal["resilient", "modulo"]
NONE = -1


@dataclass(frozen=True)
class Flows:
    """F flows; all arrays [F]."""

    src_nic: Ints
    dst_nic: Ints
    source_port: Ints
    tx: Ints
    """Bond port by which the flow leaves."""

    def __len__(self) -> int:
        return len(self.src_nic)

    def only(self, which: Ints | Bools) -> Flows:
        """A part of them."""
        return Flows(self.src_nic[which], self.dst_nic[which], self.source_port[which], self.tx[which])

    def with_ports(self, source_port: Ints, tx: Ints | None = None) -> Flows:
        return replace(self, source_port=source_port, tx=self.tx if tx is None else tx)


@dataclass(frozen=True)
class Paths:
    """The choices that make each flow's path; all arrays [F]; -1 where there is none."""

    tx: Ints
    spine: Ints
    """-1: the flow turns round in its leaf."""
    core: Ints
    """-1: the flow stays in its pod."""
    rx: Ints

    def __len__(self) -> int:
        return len(self.tx)

    def same(self, other: Paths) -> Bools:
        """[F]: equal paths."""
        return (
            (self.tx == other.tx)
            & (self.spine == other.spine)
            & (self.core == other.core)
            & (self.rx == other.rx)
        )  # fmt: skip

    def only(self, which: Ints | Bools) -> Paths:
        return Paths(self.tx[which], self.spine[which], self.core[which], self.rx[which])


def links_of(fabric: Fabric, src_nic: Ints, dst_nic: Ints, paths: Paths) -> Ints:
    """[F, 8]: link numbers along each path (and the two NICs' own), -1 where a path is shorter."""
    found = np.full((len(paths), 8), NONE, np.int64)
    found[:, 6], found[:, 7] = fabric.nic_send(src_nic), fabric.nic_take(dst_nic)
    found[:, 0] = fabric.host_up(src_nic, paths.tx)
    found[:, 5] = fabric.host_down(dst_nic, paths.rx)
    source, target = fabric.leaf(src_nic, paths.tx), fabric.leaf(dst_nic, paths.rx)
    over = paths.spine >= 0
    found[over, 1] = fabric.leaf_up(source, paths.spine)[over]
    found[over, 4] = fabric.leaf_down(target, paths.spine)[over]
    far = paths.core >= 0
    if far.any():
        found[far, 2] = fabric.core_up(fabric.pod_of_leaf(source), paths.spine, paths.core)[far]
        found[far, 3] = fabric.core_down(fabric.pod_of_leaf(target), paths.spine, paths.core)[far]
    return found


def is_local(fabric: Fabric, src_nic: Ints, dst_nic: Ints) -> Bools:
    """[F]: both NICs hang on the same leaves, so that no spine is needed."""
    return np.asarray(fabric.rack(src_nic) == fabric.rack(dst_nic))


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: a bijection in which every bit of the input moves every bit of the output."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class EcmpRouter:
    """The switches' own choice. Nobody but the simulated fabric may look at ``seed``: planners learn paths by probing."""

    def __init__(self, fabric: Fabric, seed: int, hashing: Hashing = "resilient"):
        """``hashing``: "resilient" moves only flows whose next hop died; "modulo" may move all when one dies."""
        self.fabric, self.seed, self.hashing = fabric, seed, hashing

    def on(self, fabric: Fabric) -> EcmpRouter:
        """The same switches after failures or repairs."""
        return EcmpRouter(fabric, self.seed, self.hashing)

    def route(self, flows: Flows) -> Paths:
        """The path of each flow; a flow's ``tx`` is kept unless that port is dead (then the bond fails over).

        Raises:
            UnreachableError: no path is left.
        """
        fabric, spec = self.fabric, self.fabric.spec
        src, dst = flows.src_nic, flows.dst_nic
        ports = spec.ports_per_nic
        tuple_hash = self._tuple_hash(flows)
        count = len(flows)
        local = is_local(fabric, src, dst)
        every = np.arange(ports)
        # [F, ports]: what each side's bond can use
        can_send = fabric.alive[fabric.host_up(src[:, None], every)]
        can_take = fabric.alive[fabric.host_down(dst[:, None], every)]
        targets = fabric.leaf(dst[:, None], every)
        leaves = fabric.leaf(src[:, None], every)
        # [F, ports, spines]: spine -> the leaf of the receiver's port, and that port, are up
        arrives = fabric.down_alive[targets] & can_take[:, :, None]
        reach = arrives.any(1)
        far = ~local & (fabric.pod_of_leaf(leaves[:, 0]) != fabric.pod_of_leaf(targets[:, 0]))
        core_ok = np.zeros((count, spec.spines, max(1, spec.cores)), bool)
        if far.any():
            source_pod, target_pod = fabric.pod_of_leaf(leaves[far, 0]), fabric.pod_of_leaf(targets[far, 0])
            core_ok[far] = fabric.core_up_alive[source_pod] & fabric.core_down_alive[target_pod]
            reach = reach & (~far[:, None] | core_ok.any(2))
        usable = np.where(
            local[:, None], can_send & can_take, can_send & (fabric.up_alive[leaves] & reach[:, None, :]).any(2)
        )
        tx = self._choose(flows.tx % ports, usable, tuple_hash, 1, src * ports)
        spine = np.full(count, NONE, np.int64)
        core = np.full(count, NONE, np.int64)
        rx = tx.copy()
        over = np.flatnonzero(~local)
        if len(over):
            leaf = fabric.leaf(src[over], tx[over])
            options = fabric.up_alive[leaf] & reach[over]
            drawn = self._hash(tuple_hash[over], leaf)
            spine[over] = self._choose((drawn % spec.spines).astype(np.int64), options, drawn, 2, leaf)
        out = np.flatnonzero(far)
        if len(out):
            switch = spec.leaves + fabric.pod_of_leaf(leaves[out, 0]) * spec.spines + spine[out]
            drawn = self._hash(tuple_hash[out], switch)
            core[out] = self._choose((drawn % spec.cores).astype(np.int64), core_ok[out, spine[out]], drawn, 3, switch)
        if len(over):
            switch = 2 * spec.leaves + spec.pods * spec.spines + fabric.pod_of_leaf(targets[over, 0]) * spec.spines
            switch = switch + spine[over]
            drawn = self._hash(tuple_hash[over], switch)
            options = arrives[over, :, :][np.arange(len(over)), :, spine[over]]
            rx[over] = self._choose((drawn % ports).astype(np.int64), options, drawn, 4, switch)
        return Paths(tx, spine, core, rx)

    def _tuple_hash(self, flows: Flows) -> NDArray[np.uint64]:
        one = _mix(flows.src_nic.astype(np.uint64) << np.uint64(32) | flows.dst_nic.astype(np.uint64))
        return _mix(one ^ (flows.source_port.astype(np.uint64) << np.uint64(16) | np.uint64(ROCE_PORT)))

    def _hash(self, tuple_hash: NDArray[np.uint64], switch: Ints) -> NDArray[np.uint64]:
        base = np.uint64((self.seed * 0x9E3779B97F4A7C15 + 0x1234567) % 2**64)
        return _mix(tuple_hash ^ _mix(switch.astype(np.uint64) + base)) >> np.uint64(16)

    def _choose(self, wanted: Ints, options: Bools, drawn: NDArray[np.uint64], salt: int, switch: Ints) -> Ints:
        """``wanted`` where it is one of ``options`` [F, N]; else (or for "modulo", always) by hash among the options."""
        left = options.sum(1)
        if len(left) and left.min() == 0:
            raise UnreachableError("Failures have left no path between two of the NICs.")
        keep = options[np.arange(len(wanted)), wanted]
        if self.hashing == "modulo" and salt != 1:
            keep = left == options.shape[1]
        if keep.all():
            return wanted
        again = self._hash(drawn + np.uint64(salt), switch)
        place = (again % left.astype(np.uint64)).astype(np.int64)
        nth = (np.cumsum(options, 1) == (place + 1)[:, None]) & options
        return np.where(keep, wanted, nth.argmax(1))
