"""Reading SimAI's analytical workloads (aliyun/SimAI): the parallel shape of a training job and the bytes of its collectives.

A line is: layer, dependency, forward (compute ns, collective, bytes), input gradient (the same), weight gradient (the
same), update.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from actors.c4.paths.errors import PathError


@dataclass(frozen=True)
class SimaiWorkload:
    """One iteration of a job."""

    gpus: int
    tp: int
    ep: int
    pp: int
    vpp: int
    micro_batches: int
    pp_bytes: int
    """Of an activation between pipeline stages."""
    group_bytes: dict[str, int]
    """Group (tp, dp, ep, dp_ep) -> bytes that the listed collectives move, summed over the lines of the file."""
    collectives: dict[str, int]
    """Collective -> how many lines name it."""

    @property
    def dp(self) -> int:
        return self.gpus // (self.tp * self.pp)


_HEADER = re.compile(r"(\w+): (\d+)")


def read_simai(file: Path) -> SimaiWorkload:
    """Reads one file.

    Raises:
        PathError: not such a file.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        header = {key: int(value) for key, value in _HEADER.findall(lines[0].replace("pp_comm ", "pp_comm: "))}
        wanted = {"model_parallel_NPU_group", "ep", "pp", "vpp", "ga", "all_gpus"}
        if missing := wanted - set(header):
            raise PathError(f"The SimAI workload {file} does not state {', '.join(sorted(missing))}.")
        groups: dict[str, int] = {}
        kinds: dict[str, int] = {}
        for line in lines[2:]:
            parts = line.split()
            if len(parts) < 11:
                raise PathError(f"A line of the SimAI workload {file} has {len(parts)} fields, not 12: {line[:60]!r}.")
            for place, bare_group in ((3, "tp"), (6, "tp"), (9, "dp")):
                kind, size = parts[place], int(parts[place + 1])
                if kind == "NONE" or size == 0:
                    continue
                name, _, suffix = kind.partition("_")
                group = suffix.lower() or bare_group
                groups[group] = groups.get(group, 0) + size
                kinds[name] = kinds.get(name, 0) + 1
    except (OSError, ValueError, IndexError) as error:
        raise PathError(f"The SimAI workload {file} cannot be read: {error}.") from error
    return SimaiWorkload(
        header["all_gpus"], header["model_parallel_NPU_group"], header["ep"], header["pp"], header["vpp"], header["ga"],
        header.get("pp_comm", 0), groups, kinds,
    )  # fmt: skip
