"""Clos fabrics with dual-port NICs: leaf-spine and three tiers, as arrays of directed links. The ground of all path planning.

A node has ``nics_per_node`` NICs of ``ports_per_nic`` ports. ``nodes_per_group`` nodes share a set of leaves: one leaf for each
(rail, port), where NIC i belongs to rail ``i % rails``; so the left ports of a rail meet in one leaf, the right ports in another.
Each leaf has one link to every spine of its pod; with ``groups_per_pod`` there is a third tier: spine s of each pod has one
link to
each of the ``cores_per_spine`` cores of plane s. Links are directed and numbered, so that a flow's path is a row of integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import yaml
from numpy.typing import NDArray

from actors.c4.paths.errors import PathError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class ClosSpec:
    """Shape and speeds; rates in Gb/s (any one unit will do: the lab uses Mb/s)."""

    nodes: int
    nics_per_node: int = 8
    ports_per_nic: int = 2
    port_gbps: float = 200.0
    nic_cap_gbps: float = 362.0
    """What a NIC can be fed with (NVLink's share in the paper's testbed), both ports together."""
    nodes_per_group: int = 8
    rails: int = 8
    spines: int = 8
    """In each pod."""
    uplink_gbps: float = 200.0
    groups_per_pod: int | None = None
    """None: two tiers, one pod."""
    cores_per_spine: int = 0
    core_gbps: float = 0.0

    def __post_init__(self) -> None:
        positive = ("nodes", "nics_per_node", "ports_per_nic", "nodes_per_group", "rails", "spines")
        for name in positive:
            if getattr(self, name) < 1:
                raise PathError(f"A fabric's {name} must be at least 1, not {getattr(self, name)}.")
        for name in ("port_gbps", "nic_cap_gbps", "uplink_gbps"):
            if not getattr(self, name) > 0:
                raise PathError(f"A fabric's {name} must be above 0, not {getattr(self, name)}.")
        if self.nics_per_node % self.rails:
            raise PathError(f"{self.nics_per_node} NICs a node cannot be spread evenly over {self.rails} rails.")
        if self.nodes % self.nodes_per_group:
            raise PathError(f"{self.nodes} nodes are no whole number of groups of {self.nodes_per_group}.")
        if self.groups_per_pod is not None:
            if self.groups_per_pod < 1 or (self.nodes // self.nodes_per_group) % self.groups_per_pod:
                raise PathError(f"The groups are no whole number of pods of {self.groups_per_pod}.")
            if self.cores_per_spine < 1 or not self.core_gbps > 0:
                raise PathError("Three tiers need cores_per_spine of at least 1 and core_gbps above 0.")

    @property
    def groups(self) -> int:
        return self.nodes // self.nodes_per_group

    @property
    def pods(self) -> int:
        return 1 if self.groups_per_pod is None else self.groups // self.groups_per_pod

    @property
    def nics(self) -> int:
        return self.nodes * self.nics_per_node

    @property
    def leaves(self) -> int:
        return self.groups * self.rails * self.ports_per_nic

    @property
    def cores(self) -> int:
        """In each plane; 0 in two tiers."""
        return self.cores_per_spine if self.groups_per_pod is not None else 0

    @property
    def oversubscription(self) -> float:
        """Capacity into a leaf from its hosts over capacity up."""
        down = self.nodes_per_group * (self.nics_per_node // self.rails) * self.port_gbps
        return down / (self.spines * self.uplink_gbps)

    def oversubscribed(self, ratio: int) -> ClosSpec:
        """The same fabric with one spine left of every ``ratio`` (the paper's 2:1 has half the spines)."""
        if ratio < 1 or self.spines % ratio:
            raise PathError(f"{self.spines} spines cannot be cut to one of every {ratio}.")
        return replace(self, spines=self.spines // ratio)


class Fabric:
    """A spec with its links: numbering, capacities, and which of them are up. Never changed: ``failed`` gives a new one."""

    def __init__(self, spec: ClosSpec, down: frozenset[int] = frozenset()):
        self.spec = spec
        self.down = down
        hosts, leaves, spines, cores = spec.nics * spec.ports_per_nic, spec.leaves, spec.spines, spec.cores
        self._host_down = hosts
        self._leaf_up = 2 * hosts
        self._leaf_down = self._leaf_up + leaves * spines
        self._core_up = self._leaf_down + leaves * spines
        self._core_down = self._core_up + spec.pods * spines * cores
        self._nic_send = self._core_down + spec.pods * spines * cores
        self.links = self._nic_send + 2 * spec.nics
        capacity = np.empty(self.links)
        capacity[: self._leaf_up] = spec.port_gbps
        capacity[self._leaf_up : self._core_up] = spec.uplink_gbps
        capacity[self._core_up : self._nic_send] = spec.core_gbps
        capacity[self._nic_send :] = spec.nic_cap_gbps
        if any(not 0 <= link < self.links for link in down):
            raise PathError(f"A failed link's number must be from 0 to {self.links - 1}.")
        self.alive: Bools = np.ones(self.links, bool)
        self.alive[list(down)] = False
        self.capacity: Floats = np.where(self.alive, capacity, 0.0)

    # ---- numbering; all take and give integers or arrays of them

    def nic(self, node: Any, index: Any) -> Any:
        """Number of a NIC."""
        return node * self.spec.nics_per_node + index

    def rack(self, nic: Any) -> Any:
        """(group, rail) of a NIC as one number: the leaves of all its ports are ``rack * ports_per_nic + port``."""
        node, index = nic // self.spec.nics_per_node, nic % self.spec.nics_per_node
        return (node // self.spec.nodes_per_group) * self.spec.rails + index % self.spec.rails

    def leaf(self, nic: Any, port: Any) -> Any:
        return self.rack(nic) * self.spec.ports_per_nic + port

    def pod_of_leaf(self, leaf: Any) -> Any:
        group = leaf // (self.spec.rails * self.spec.ports_per_nic)
        return group // self.spec.groups_per_pod if self.spec.groups_per_pod else group * 0

    def host_up(self, nic: Any, port: Any) -> Any:
        return nic * self.spec.ports_per_nic + port

    def host_down(self, nic: Any, port: Any) -> Any:
        return self._host_down + nic * self.spec.ports_per_nic + port

    def leaf_up(self, leaf: Any, spine: Any) -> Any:
        return self._leaf_up + leaf * self.spec.spines + spine

    def leaf_down(self, leaf: Any, spine: Any) -> Any:
        return self._leaf_down + leaf * self.spec.spines + spine

    def core_up(self, pod: Any, spine: Any, core: Any) -> Any:
        return self._core_up + (pod * self.spec.spines + spine) * self.spec.cores + core

    def core_down(self, pod: Any, spine: Any, core: Any) -> Any:
        return self._core_down + (pod * self.spec.spines + spine) * self.spec.cores + core

    def nic_send(self, nic: Any) -> Any:
        """From the node's GPUs into the NIC: both its ports together."""
        return self._nic_send + nic

    def nic_take(self, nic: Any) -> Any:
        return self._nic_send + self.spec.nics + nic

    # ---- views

    @cached_property
    def up_alive(self) -> Bools:
        """[leaves, spines]: the link from leaf to spine is up."""
        return self.alive[self._leaf_up : self._leaf_down].reshape(self.spec.leaves, self.spec.spines)

    @cached_property
    def down_alive(self) -> Bools:
        """[leaves, spines]: the link from spine to leaf is up."""
        return self.alive[self._leaf_down : self._core_up].reshape(self.spec.leaves, self.spec.spines)

    @cached_property
    def core_up_alive(self) -> Bools:
        """[pods, spines, cores]."""
        shape = (self.spec.pods, self.spec.spines, self.spec.cores)
        return self.alive[self._core_up : self._core_down].reshape(shape)

    @cached_property
    def core_down_alive(self) -> Bools:
        """[pods, spines, cores]."""
        shape = (self.spec.pods, self.spec.spines, self.spec.cores)
        return self.alive[self._core_down : self._nic_send].reshape(shape)

    # ---- failures

    def failed(self, links: Iterable[int]) -> Fabric:
        """This fabric with these links down as well."""
        return Fabric(self.spec, self.down | frozenset(int(link) for link in links))

    def repaired(self) -> Fabric:
        """All links up."""
        return Fabric(self.spec)

    def cable_of(self, leaf: int, spine: int) -> tuple[int, int]:
        """Both directions between a leaf and a spine of its pod."""
        if not (0 <= leaf < self.spec.leaves and 0 <= spine < self.spec.spines):
            raise PathError(f"There is no link from leaf {leaf} to spine {spine}.")
        return int(self.leaf_up(leaf, spine)), int(self.leaf_down(leaf, spine))

    def links_of_spine(self, pod: int, spine: int) -> list[int]:
        """All links of a spine."""
        leaves = [leaf for leaf in range(self.spec.leaves) if int(self.pod_of_leaf(leaf)) == pod]
        found = [link for leaf in leaves for link in self.cable_of(leaf, spine)]
        for core in range(self.spec.cores):
            found += [int(self.core_up(pod, spine, core)), int(self.core_down(pod, spine, core))]
        return found

    def links_of_leaf(self, leaf: int) -> list[int]:
        """All links of a leaf, those to its hosts too."""
        found = [link for spine in range(self.spec.spines) for link in self.cable_of(leaf, spine)]
        rack, port = divmod(leaf, self.spec.ports_per_nic)
        for nic in range(self.spec.nics):
            if int(self.rack(nic)) == rack:
                found += [int(self.host_up(nic, port)), int(self.host_down(nic, port))]
        return found

    def name(self, link: int) -> str:
        """What a link is, for people."""
        spec, ports = self.spec, self.spec.ports_per_nic
        if link >= self._nic_send:
            node, index = divmod((link - self._nic_send) % spec.nics, spec.nics_per_node)
            inside, outside = f"node{node}/gpu{index}", f"node{node}/nic{index}"
            return f"{inside} -> {outside}" if link < self._nic_send + spec.nics else f"{outside} -> {inside}"
        if link < self._leaf_up:
            nic, port = divmod(link % self._host_down, ports)
            host = f"node{nic // spec.nics_per_node}/nic{nic % spec.nics_per_node}"
            switch = f"leaf{self.leaf(nic, port)}"
            return f"{host} -> {switch}" if link < self._host_down else f"{switch} -> {host}"
        if link < self._core_up:
            leaf, spine = divmod((link - self._leaf_up) % (spec.leaves * spec.spines), spec.spines)
            above = f"spine{self.pod_of_leaf(leaf)}.{spine}"
            return f"leaf{leaf} -> {above}" if link < self._leaf_down else f"{above} -> leaf{leaf}"
        rest, core = divmod((link - self._core_up) % max(1, spec.pods * spec.spines * spec.cores), spec.cores)
        pod, spine = divmod(rest, spec.spines)
        below, above = f"spine{pod}.{spine}", f"core{spine}.{core}"
        return f"{below} -> {above}" if link < self._core_down else f"{above} -> {below}"

    def graph(self) -> nx.DiGraph:
        """The links that are up as a directed graph with ``capacity`` and ``link`` on each edge."""
        graph = nx.DiGraph()
        for link in np.flatnonzero(self.alive):
            source, destination = self.name(int(link)).split(" -> ")
            graph.add_edge(source, destination, capacity=float(self.capacity[link]), link=int(link))
        return graph


def paper_testbed() -> ClosSpec:
    """16 nodes x 8 GPUs with dual-port 2 x 200 Gb/s NICs, 1:1, 8 uplinks a leaf (C4, evaluation).

    Groups of eight nodes, so that a job of two nodes in different groups crosses the spines, as in the paper's experiment.
    """
    return ClosSpec(nodes=16)


def pod_fabric(gpus: int, ratio: int = 1) -> ClosSpec:
    """A rail-optimised fabric of at least ``gpus`` GPUs: two tiers up to 2,048, else pods of 2,048 under a core.

    Args:
        gpus: rounded up to whole groups (128 or 256 GPUs) or pods.
        ratio: over-subscription of the leaves.
    """
    if gpus <= 2048:
        nodes = -(-gpus // 128) * 16
        spec = ClosSpec(nodes=nodes, nodes_per_group=16, spines=16)
    else:
        nodes = -(-gpus // 2048) * 256
        spec = ClosSpec(
            nodes=nodes, nodes_per_group=32, spines=32, groups_per_pod=8, cores_per_spine=16, core_gbps=128 * 200 / 16
        )
    return spec.oversubscribed(ratio)


PRESETS = {"paper": paper_testbed, "gpus_1000": lambda: pod_fabric(1000), "gpus_10000": lambda: pod_fabric(10_000)}


def spec_from(description: Mapping[str, Any]) -> ClosSpec:
    """A spec from a mapping: the fields of ``ClosSpec``, over ``preset`` when that is given; ``oversubscription`` cuts spines.

    Raises:
        PathError: unknown key, wrong type or impossible shape.
    """
    values = dict(description)
    preset = values.pop("preset", None)
    ratio = values.pop("oversubscription", 1)
    if preset is not None and preset not in PRESETS:
        raise PathError(f"There is no fabric preset {preset!r}: choose one of {', '.join(PRESETS)}.")
    known = {field.name: field for field in fields(ClosSpec)}
    for key, value in values.items():
        if key not in known:
            raise PathError(f"A fabric has no {key!r}: it has {', '.join([*known, 'preset', 'oversubscription'])}.")
        whole = "int" in str(known[key].type)
        optional = "None" in str(known[key].type)
        if not (value is None and optional) and (
            isinstance(value, bool) or not isinstance(value, int if whole else (int, float))
        ):
            raise PathError(f"A fabric's {key} must be {'a whole number' if whole else 'a number'}, not {value!r}.")
    if preset is None and "nodes" not in values:
        raise PathError("A fabric needs a preset or its number of nodes.")
    if not isinstance(ratio, int) or isinstance(ratio, bool):
        raise PathError(f"A fabric's oversubscription must be a whole number, not {ratio!r}.")
    base = replace(PRESETS[preset](), **values) if preset is not None else ClosSpec(**values)
    return base.oversubscribed(ratio)


def read_fabric(file: Path) -> Fabric:
    """A fabric from YAML: the keys of ``spec_from``, and ``failed``: a list of {leaf, spine}, {pod, spine} or {leaf}.

    Raises:
        PathError: unreadable, or not a fabric.
    """
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PathError(f"The fabric {file} cannot be read: {error}.") from error
    if not isinstance(data, dict):
        raise PathError(f"The fabric {file} must be a mapping.")
    failures = data.pop("failed", None) or []
    return with_failures(Fabric(spec_from(data)), failures)


def with_failures(fabric: Fabric, failures: Iterable[Mapping[str, int]]) -> Fabric:
    """The fabric with cables ({leaf, spine}), spines ({pod, spine}) and leaves ({leaf}) down.

    Raises:
        PathError: a mapping of other keys, or a part that is not there.
    """
    links: list[int] = []
    for failure in failures:
        if not isinstance(failure, Mapping) or not all(isinstance(value, int) for value in failure.values()):
            raise PathError(f"A failure is a mapping of names to numbers, not {failure!r}.")
        keys = set(failure)
        if keys == {"leaf", "spine"}:
            links += fabric.cable_of(failure["leaf"], failure["spine"])
        elif keys == {"pod", "spine"}:
            if not (0 <= failure["pod"] < fabric.spec.pods and 0 <= failure["spine"] < fabric.spec.spines):
                raise PathError(f"There is no spine {failure['spine']} in pod {failure['pod']}.")
            links += fabric.links_of_spine(failure["pod"], failure["spine"])
        elif keys == {"leaf"}:
            if not 0 <= failure["leaf"] < fabric.spec.leaves:
                raise PathError(f"There is no leaf {failure['leaf']}.")
            links += fabric.links_of_leaf(failure["leaf"])
        else:
            raise PathError(f"A failure is {{leaf, spine}}, {{pod, spine}} or {{leaf}}, not {dict(failure)}.")
    return fabric.failed(links)
