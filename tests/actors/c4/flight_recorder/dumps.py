"""Small hand-made dumps for tests: one group or a few, a handful of entries, in the schema of a chosen version."""

from __future__ import annotations

from typing import Any


def entry(
    record: int,
    name: str = "all_reduce",
    seq: int = 1,
    state: str = "completed",
    group: str = "0",
    desc: str = "default_pg",
    **more: Any,
) -> dict[str, Any]:
    """One entry of PyTorch 2.9; ``more`` overrides fields."""
    p2p = name.startswith(("send", "recv"))
    return {
        "record_id": record,
        "pg_id": int(group) if group.isdigit() else 0,
        "process_group": (group, desc),
        "collective_seq_id": 0 if p2p else seq,
        "p2p_seq_id": seq if p2p else 0,
        "op_id": seq,
        "profiling_name": f"nccl:{name}",
        "time_created_ns": 1_700_000_000_000_000_000 + record,
        "input_sizes": [[16]],
        "input_dtypes": ["Float"],
        "output_sizes": [[16]],
        "output_dtypes": ["Float"],
        "state": state,
        "time_discovered_started_ns": None,
        "time_discovered_completed_ns": 1_700_000_000_000_000_001 + record if state == "completed" else None,
        "retired": state == "completed",
        "timeout_ms": 600000,
        "is_p2p": p2p,
        **more,
    }


def dump(
    entries: list[dict[str, Any]], world: int = 4, groups: dict[str, tuple[str, list[int]]] | None = None
) -> dict[str, Any]:
    """A dump of PyTorch 2.9 with the default group of ``world`` ranks and ``groups``: name -> (description, ranks)."""
    config = {"0": ("default_pg", list(range(world))), **(groups or {})}
    return {
        "version": "2.9",
        "pg_config": {
            name: {"name": name, "desc": desc, "ranks": str(ranks)} for name, (desc, ranks) in config.items()
        },
        "entries": entries,
    }


def old(entries: list[dict[str, Any]], version: str) -> Any:
    """The same entries as an older PyTorch wrote them: ``1.0`` a bare list, ``1.5`` and ``2.0`` with other names."""
    result = []
    for one in entries:
        changed = dict(one)
        changed["seq_id"] = changed.pop("collective_seq_id") or changed.pop("p2p_seq_id")
        changed.pop("p2p_seq_id", None)
        changed.pop("is_p2p")
        changed.pop("op_id")
        if version == "1.0":
            changed.pop("process_group")
            changed["time_created_us"] = changed.pop("time_created_ns") // 1000
        elif version == "1.5":
            changed["process_group"] = changed["process_group"][0]
        result.append(changed)
    return result if version == "1.0" else {"version": version, "entries": result}
