"""A leaf-spine fabric in network namespaces: hosts with two ports, ECMP by 5-tuple hash, rate-limited links. Linux, as root.

Host i has one port in each of two planes, with addresses 10.(1 + plane).i.(1 + job). A leaf for each (group, plane) has a
link to every
spine; the leaf hashes the packet's 5-tuple (``fib_multipath_hash_policy``), the spine has one way down. Everything lives in
namespaces of this object's own, which are deleted when the context ends; nothing of the machine's own network is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from actors.c4.paths.errors import FabricError
from actors.c4.paths.topology import ClosSpec, Fabric

_NETNS = Path("/var/run/netns")
_CLONE_NEWNET = 0x40000000
_IP_RECVERR, _MSG_ERRQUEUE = 11, 0x2000
_COMMAND_S = 30.0
_FIVE_TUPLE = "0x37"
"""Addresses, protocol and both ports. Policy 1 means the same for packets off a wire, but takes the socket's own random hash for
packets that come over veth, and that no source port controls; policy 3 always reads the packet."""
MTU = 9000
PAYLOAD = (MTU - 52) / (MTU + 14)
"""Share of a link's bits that is a TCP stream's data: IP, TCP with time stamps, Ethernet are the rest."""
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class LabShape:
    """How large the lab is."""

    hosts_per_group: int = 4
    spines: int = 4
    link_mbps: float = 100.0
    addresses: int = 4
    """Of each port: one for each rank on a host."""

    def spec(self) -> ClosSpec:
        """The same fabric for the planner and the simulator, in Mb/s of TCP data."""
        rate = self.link_mbps * PAYLOAD
        return ClosSpec(
            nodes=2 * self.hosts_per_group, nics_per_node=1, rails=1, nodes_per_group=self.hosts_per_group, spines=self.spines,
            port_gbps=rate, uplink_gbps=rate, nic_cap_gbps=2 * rate,
        )  # fmt: skip


def why_not() -> str | None:
    """What this machine lacks for the lab, as a sentence; None when it can run."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"The fabric lab needs iproute2: {', '.join(missing)} not found."
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "The fabric lab needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN) to make network namespaces."
    name = f"sxt{os.getpid()}x"
    try:
        _ip(["netns", "add", name])
    except FabricError as error:
        return f"The fabric lab cannot make network namespaces here: {error}"
    try:
        _batch("ip", name, ["link add name a type veth peer name b", "link set dev a up"])
        _batch("tc", name, ["qdisc add dev a root tbf rate 10mbit burst 32k latency 50ms"])
    except FabricError as error:
        return f"The fabric lab needs veth and the tbf queue: {error}"
    finally:
        _delete(name)
    return None


class NamespaceFabric:
    """The fabric, up while the context lasts."""

    def __init__(self, shape: LabShape):
        if not 1 <= shape.hosts_per_group <= 16 or not 2 <= shape.spines <= 16 or not 1 <= shape.addresses <= 64:
            raise FabricError("The lab has 1 to 16 hosts a group, 2 to 16 spines, and 1 to 64 addresses a port.")
        self.shape = shape
        self.model = Fabric(shape.spec())
        self._prefix = f"sxt{os.getpid()}"
        self._down: set[tuple[int, int]] = set()

    def __enter__(self) -> NamespaceFabric:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def hosts(self) -> int:
        return 2 * self.shape.hosts_per_group

    def host(self, index: int) -> str:
        """Namespace of a host."""
        return f"{self._prefix}h{index}"

    def leaf(self, leaf: int) -> str:
        return f"{self._prefix}l{leaf}"

    def spine(self, spine: int) -> str:
        return f"{self._prefix}s{spine}"

    @property
    def namespaces(self) -> list[str]:
        """All of them."""
        return [
            *(self.host(host) for host in range(self.hosts)),
            *(self.leaf(leaf) for leaf in range(4)),
            *(self.spine(spine) for spine in range(self.shape.spines)),
        ]

    def address(self, host: int, plane: int, place: int = 0) -> str:
        """Of a host's port; ``place`` counts the addresses of one port."""
        return f"10.{1 + plane}.{host}.{1 + place}"

    def close(self) -> None:
        """Deletes the namespaces with all that is in them; twice does no harm."""
        for name in self.namespaces:
            if (_NETNS / name).exists():
                _delete(name)

    # ---- failures

    def fail(self, leaf: int, spine: int) -> None:
        """Cuts one cable; the routing that a real fabric has (BGP) withdraws it: no leaf sends over it any more."""
        _batch("ip", self.leaf(leaf), [f"link set u{spine} down"])
        self._down.add((leaf, spine))
        self.model = self.model.failed(self.model.cable_of(leaf, spine))
        for other in range(4):
            _batch("ip", self.leaf(other), self._routes(other))

    def _routes(self, leaf: int) -> list[str]:
        group, plane = divmod(leaf, 2)
        target = 2 * (1 - group) + plane
        spines = [s for s in range(self.shape.spines) if (leaf, s) not in self._down and (target, s) not in self._down]
        if not spines:
            raise FabricError(f"No spine is left between leaf {leaf} and leaf {target}.")
        hops = " ".join(f"nexthop via {self._link_address(leaf, s, 2)} dev u{s}" for s in spines)
        first = (1 - group) * self.shape.hosts_per_group
        return [
            f"route replace 10.{1 + plane}.{host}.0/24 {hops}"
            for host in range(first, first + self.shape.hosts_per_group)
        ]

    def _link_address(self, leaf: int, spine: int, end: int) -> str:
        return f"10.50.{leaf * self.shape.spines + spine}.{end}"

    # ---- building

    def _build(self) -> None:
        shape, count = self.shape, self.shape.hosts_per_group
        _batch("ip", None, [f"netns add {name}" for name in self.namespaces])
        links = [
            f"link add p{plane} mtu {MTU} netns {self.host(host)} type veth peer name d{host} mtu {MTU} "
            f"netns {self.leaf(2 * (host // count) + plane)}"
            for host in range(self.hosts) for plane in (0, 1)
        ] + [
            f"link add u{spine} mtu {MTU} netns {self.leaf(leaf)} type veth peer name l{leaf} mtu {MTU} netns {self.spine(spine)}"
            for leaf in range(4) for spine in range(shape.spines)
        ]  # fmt: skip
        _batch("ip", None, links)
        for host in range(self.hosts):
            lines = ["link set lo up"]
            for plane in (0, 1):
                lines += [f"addr add {self.address(host, plane, at)}/24 dev p{plane}" for at in range(shape.addresses)]
                lines += [f"link set p{plane} up", f"route add 10.{1 + plane}.0.0/16 via 10.{1 + plane}.{host}.254"]
            _batch("ip", self.host(host), lines)
            self._limit(self.host(host), ["p0", "p1"])
        for leaf in range(4):
            group, plane = divmod(leaf, 2)
            mine = range(group * count, (group + 1) * count)
            lines = ["link set lo up"]
            for host in mine:
                lines += [f"addr add 10.{1 + plane}.{host}.254/24 dev d{host}", f"link set d{host} up"]
            for spine in range(shape.spines):
                lines += [f"addr add {self._link_address(leaf, spine, 1)}/30 dev u{spine}", f"link set u{spine} up"]
            _batch("ip", self.leaf(leaf), lines)
            self._limit(self.leaf(leaf), [*(f"d{host}" for host in mine), *(f"u{s}" for s in range(shape.spines))])
        for spine in range(shape.spines):
            lines = ["link set lo up"]
            for leaf in range(4):
                lines += [f"addr add {self._link_address(leaf, spine, 2)}/30 dev l{leaf}", f"link set l{leaf} up"]
            for leaf in range(4):
                group, plane = divmod(leaf, 2)
                lines += [
                    f"route add 10.{1 + plane}.{host}.0/24 via {self._link_address(leaf, spine, 1)}"
                    for host in range(group * count, (group + 1) * count)
                ]
            _batch("ip", self.spine(spine), lines)
            self._limit(self.spine(spine), [f"l{leaf}" for leaf in range(4)])
        for name in self.namespaces:
            within(name, _routers_settings)
        for leaf in range(4):
            _batch("ip", self.leaf(leaf), self._routes(leaf))

    def _limit(self, name: str, devices: Sequence[str]) -> None:
        rate = self.shape.link_mbps
        burst = max(2 * 65536, int(rate * 1e6 / 8 / 250))
        _batch("tc", name, [
            f"qdisc add dev {device} root tbf rate {rate}mbit burst {burst} latency 60ms" for device in devices
        ])  # fmt: skip

    # ---- probing

    def trace(self, host: int, target: str, port: int, source_ports: Sequence[int]) -> list[int | None]:
        """The spine that each source port's connection to (target, port) would cross; None without answer.

        A SYN with a time to live of two dies in the spine, which says so (ICMP time exceeded) from the address by which it came.
        """
        return within(self.host(host), lambda: [self._trace(target, port, source) for source in source_ports])

    def _trace(self, target: str, port: int, source: int) -> int | None:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 2)
            probe.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
            probe.setblocking(False)
            try:
                probe.bind(("", source))
                code = probe.connect_ex((target, port))
            except OSError:
                return None
            if code not in (errno.EINPROGRESS, errno.EHOSTUNREACH):
                return None
            poll = select.poll()
            poll.register(probe, select.POLLERR)
            if not poll.poll(300):
                return None
            with contextlib.suppress(OSError):
                _, control, _, _ = probe.recvmsg(1, 512, _MSG_ERRQUEUE)
                for level, kind, data in control:
                    if level == socket.IPPROTO_IP and kind == _IP_RECVERR and len(data) >= 24:
                        # struct sock_extended_err (16 bytes), then the offender's sockaddr_in: family, port, address
                        octets = struct.unpack_from("4B", data, 20)
                        if octets[:2] == (10, 50):
                            return int(octets[2]) % self.shape.spines
        return None


def within(name: str, call: Callable[[], ResultT]) -> ResultT:
    """``call()`` in a thread of its own inside a namespace; its result, or what it raised."""
    result: list[ResultT] = []
    raised: list[BaseException] = []

    def body() -> None:
        try:
            enter(name)
            result.append(call())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=body, name=f"in {name}")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return result[0]


def enter(name: str) -> None:
    """Moves the calling thread (a process, while it has only one) into a network namespace.

    Raises:
        FabricError: it is not there, or the privilege is missing.
    """
    library = ctypes.CDLL(None, use_errno=True)
    try:
        handle = os.open(_NETNS / name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise FabricError(f"There is no network namespace {name}.") from error
    try:
        if library.setns(handle, _CLONE_NEWNET) != 0:
            raise FabricError(f"The namespace {name} cannot be entered: {os.strerror(ctypes.get_errno())}.")
    finally:
        os.close(handle)


def _routers_settings() -> None:
    # /proc/sys/net shows the calling thread's namespace
    for key, value in {
        "ipv4/ip_forward": "1", "ipv4/fib_multipath_hash_policy": "3", "ipv4/fib_multipath_hash_fields": _FIVE_TUPLE,
        "ipv4/conf/all/rp_filter": "0",
        "ipv4/conf/default/rp_filter": "0", "ipv4/icmp_ratelimit": "0", "ipv4/tcp_slow_start_after_idle": "0",
    }.items():  # fmt: skip
        Path("/proc/sys/net", key).write_text(value)
    for device in Path("/proc/sys/net/ipv4/conf").iterdir():
        (device / "rp_filter").write_text("0")


def _ip(arguments: Sequence[str]) -> None:
    _run(["ip", *arguments], "")


def _batch(tool: str, name: str | None, lines: Sequence[str]) -> None:
    _run([tool, *(["-n", name] if name else []), "-batch", "-"], "".join(f"{line}\n" for line in lines))


def _run(command: Sequence[str], text: str) -> None:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FabricError(f"{' '.join(command[:4])} failed: {error}.") from error
    if done.returncode:
        raise FabricError(
            f"{' '.join(command[:4])}: {done.stderr.strip().splitlines()[0] if done.stderr else 'failed'}"
        )


def _delete(name: str) -> None:
    with contextlib.suppress(FabricError):
        _ip(["netns", "del", name])


def leftovers() -> list[str]:
    """Namespaces of labs whose process is gone (killed with SIGKILL): safe to delete."""
    found = []
    for entry in _NETNS.glob("sxt*") if _NETNS.is_dir() else []:
        digits = "".join(iter_digits(entry.name[3:]))
        if digits and not Path("/proc", digits).exists():
            found.append(entry.name)
    return sorted(found)


def iter_digits(text: str) -> Iterator[str]:
    """The digits with which a text begins."""
    for letter in text:
        if not letter.isdigit():
            return
        yield letter


def sweep() -> int:
    """Deletes ``leftovers``; how many."""
    names = leftovers()
    for name in names:
        _delete(name)
    return len(names)
