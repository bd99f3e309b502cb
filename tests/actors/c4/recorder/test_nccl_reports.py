"""NCCL's own reports: RAS as ``ncclras -f json`` prints it, and the inspector's lines."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from actors.c4.recorder.errors import RecorderError
from actors.c4.recorder.nccl_reports import parse_inspector, parse_ras, query_ras, read_inspector

RUNNING = {"init_state": 0, "async_error": 0, "finalize_called": False, "destroy_flag": False, "abort_flag": False}


def rank(number: int, **counts: int) -> dict:
    return {
        "rank": number, "host": f"node{number // 2}", "pid": 100 + number, "cuda_dev": number % 2, "nvml_dev": number % 2,
        "status": dict(RUNNING), "collective_counts": {"Broadcast": 1, "AllReduce": 0, **counts},
    }  # fmt: skip


def report(*ranks: dict, missing: tuple[dict, ...] = ()) -> str:
    communicator = {
        "hash": "0x1f2e", "secondary_hash": "0x3", "size": len(ranks) + len(missing), "ranks_count": len(ranks),
        "missing_ranks_count": len(missing), "ranks": list(ranks), "missing_ranks": list(missing),
    }  # fmt: skip
    return json.dumps({"nccl_version": "2.28.9", "communicators_count": 1, "communicators": [communicator]}, indent=1)


def test_the_rank_that_others_wait_for_lags() -> None:
    (one,) = parse_ras(report(rank(0, AllReduce=42), rank(1, AllReduce=41), rank(2, AllReduce=42)))
    assert (one.name, one.size, one.lagging) == ("0x1f2e", 3, (1,))
    assert one.ranks[1].operations == 42
    assert (one.ranks[2].host, one.ranks[2].pid) == ("node1", 102)


def test_equal_counts_lag_nowhere_whatever_the_order() -> None:
    (one,) = parse_ras(report(rank(1, AllReduce=7), rank(0, AllReduce=7)))
    assert one.lagging == ()
    assert [found.rank for found in one.ranks] == [0, 1]


def test_a_missing_rank_is_named_and_a_starting_communicator_is_not_judged() -> None:
    gone = {"rank": 1, "host": "node0", "pid": 101, "status": {"unresponsive": True, "considered_dead": False}}
    (one,) = parse_ras(report(rank(0, AllReduce=3), missing=(gone,)))
    assert one.lagging == (1,)
    assert one.ranks[1].missing
    starting = rank(1, AllReduce=2)
    starting["status"]["init_state"] = 7
    (one,) = parse_ras(report(rank(0, AllReduce=3), starting))
    assert one.lagging == ()


def test_the_comma_that_one_release_forgets_is_put_back() -> None:
    gone = {"rank": 1, "host": "node0", "pid": 101, "status": {"unresponsive": True}}
    text = report(rank(0, AllReduce=3), missing=(gone,)).replace('"pid": 101,', '"pid": 101')
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    assert parse_ras(text)[0].lagging == (1,)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"communicators": [{"hash": 1}]}', "NCCL version 2.24"])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(RecorderError, match="no report of ncclras"):
        parse_ras(text)


def test_asking_runs_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert query_ras(str(tmp_path / "nothing")) is None
    client = tmp_path / "ncclras"
    (tmp_path / "answer").write_text(report(rank(0)))
    client.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {tmp_path}/answer\n')
    client.chmod(0o755)
    monkeypatch.setenv("NCCL_RAS_ADDR", "[::1]:28029")
    found = query_ras(str(client))
    assert found is not None
    assert found[0].size == 1
    assert (tmp_path / "asked").read_text().split() == ["-f", "json", "-t", "5", "-h", "::1", "-p", "28029"]
    client.write_text("#!/bin/sh\necho \"invalid option -- 'f'\" >&2\nexit 1\n")
    with pytest.raises(RecorderError, match="invalid option"):
        query_ras(str(client))


LINE = {
    "header": {"id": "0x9e7a", "rank": 3, "n_ranks": 4, "nnodes": 1},
    "metadata": {"inspector_output_format_version": "v4.0", "dump_timestamp_us": 1749490229087081, "hostname": "h", "pid": 7},
    "coll_perf": {
        "coll": "ReduceScatter", "coll_sn": 129, "coll_msg_size_bytes": 65536, "coll_exec_time_us": 110,
        "coll_timing_source": "kernel_gpu", "coll_algobw_gbs": 19.06, "coll_busbw_gbs": 18.46,
    },
}  # fmt: skip


def test_inspector_lines_are_read_and_broken_ones_left_out(tmp_path: Path) -> None:
    whole = json.dumps(LINE)
    point_to_point = json.dumps({**LINE, "coll_perf": None, "p2p_perf": {"p2p": "Send"}})
    (one,) = parse_inspector(iter([whole, whole[:50], "", "3", point_to_point]))
    assert (one.communicator, one.rank, one.ranks, one.name, one.sequence) == ("0x9e7a", 3, 4, "ReduceScatter", 129)
    assert (one.payload, one.duration_us, one.source, one.bus_gb_per_s) == (65536, 110.0, "kernel_gpu", 18.46)
    (tmp_path / "a.log").write_text(whole + "\n" + whole[:30])
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(whole)
    (tmp_path / "c.log.gz").write_bytes(b"cut off")
    (tmp_path / "d.txt").write_text(whole)
    assert len(read_inspector(tmp_path)) == 2
