"""Small cases worked out by hand: what each rule says, and what it must not say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.c4.flight_recorder import Cause, FaultClass, diagnose, from_objects, load_folder
from tests.actors.c4.flight_recorder.dumps import dump, entry, old

TP = {"1": ("TP", [0, 1]), "2": ("TP", [2, 3])}


def of(**dumps):
    return diagnose(from_objects({int(name[1:]): value for name, value in dumps.items()}))


def test_the_rank_that_did_not_enter_is_named() -> None:
    waiting = [entry(0, seq=1), entry(1, seq=2, state="scheduled")]
    verdict = of(r0=dump(waiting), r1=dump(waiting), r2=dump([entry(0, seq=1)]), r3=dump(waiting))
    assert verdict.culprit_ranks == (2,)
    assert verdict.fault_class is FaultClass.NON_COMMUNICATION_HANG
    assert verdict.findings[0].cause is Cause.HOST_STOPPED
    assert (verdict.collective, verdict.sequence, verdict.process_group) == ("all_reduce", 2, "0:default_pg")


def test_who_waits_for_the_culprit_in_another_group_is_innocent() -> None:
    # 1 stopped in its tensor-parallel group; 0 waits for it there, and 2 and 3 wait for 0 and 1 in the default group.
    first = [entry(0, seq=1, group="1", desc="TP"), entry(1, seq=2, group="1", desc="TP", state="scheduled")]
    done = [entry(0, seq=1, group="2", desc="TP"), entry(1, seq=1, state="scheduled")]
    verdict = of(
        r0=dump(first, groups={"1": TP["1"]}),
        r1=dump(first[:1], groups={"1": TP["1"]}),
        r2=dump(done, groups={"2": TP["2"]}),
        r3=dump(done, groups={"2": TP["2"]}),
    )
    assert verdict.culprit_ranks == (1,)


def test_all_entered_and_nobody_completes_is_a_hang_of_communication_without_a_culprit() -> None:
    stuck = dump([entry(0, seq=1), entry(1, seq=2, state="started", time_discovered_started_ns=5)])
    verdict = of(r0=stuck, r1=stuck, r2=stuck, r3=stuck)
    assert verdict.fault_class is FaultClass.COMMUNICATION_HANG
    assert verdict.culprit_ranks == ()
    assert verdict.suspects == (0, 1, 2, 3)
    assert verdict.confidence == "low"


def test_the_device_that_never_started_what_others_started_is_named() -> None:
    started = dump([entry(0, seq=1), entry(1, seq=2, state="started", time_discovered_started_ns=5)])
    verdict = of(r0=started, r1=started, r2=dump([entry(0, seq=1), entry(1, seq=2, state="scheduled")]), r3=started)
    assert verdict.culprit_ranks == (2,)
    assert verdict.findings[0].cause is Cause.DEVICE_NOT_STARTED


def test_an_operation_that_only_peers_completed_tells_a_frozen_rank() -> None:
    gone_on = [entry(0, seq=1), entry(1, seq=2), entry(2, seq=3), entry(3, seq=4, state="scheduled")]
    frozen = [entry(0, seq=1), *(entry(number, seq=number + 1, state="scheduled") for number in (1, 2, 3))]
    verdict = of(r0=dump(gone_on), r1=dump(gone_on), r2=dump(frozen), r3=dump(gone_on))
    assert verdict.culprit_ranks == (2,)
    assert verdict.findings[0].cause is Cause.DEVICE_FROZEN


def test_an_early_finished_broadcast_or_all_to_all_proves_nothing() -> None:
    # The root of a broadcast completes before the others receive; with 2 still to come, nobody but 2 is to blame.
    for name in ("broadcast", "all_to_all"):
        finished = dump([entry(0, name, seq=1)])
        pending = dump([entry(0, name, seq=1, state="scheduled")])
        verdict = of(
            r0=finished, r1=pending, r2=dump([entry(0, "all_reduce", seq=1, group="9", desc="other")]), r3=pending
        )
        assert set(verdict.culprit_ranks) <= {2}


@pytest.mark.parametrize(
    ("difference", "word"),
    [
        ({"name": "broadcast"}, "broadcast"),
        ({"input_sizes": [[8]]}, "8 elements"),
        ({"input_dtypes": ["Half"]}, "Half"),
    ],
)
def test_the_minority_of_a_mismatch_is_named(difference: dict, word: str) -> None:
    common = dump([entry(0, seq=1), entry(1, seq=2, state="scheduled")])
    other = dump(
        [entry(0, seq=1), entry(1, seq=2, state="scheduled", **{k: v for k, v in difference.items() if k != "name"})]
    )
    if "name" in difference:
        other["entries"][1]["profiling_name"] = "nccl:broadcast"
    verdict = of(r0=common, r1=other, r2=common, r3=common)
    assert verdict.culprit_ranks == (1,)
    assert verdict.fault_class is FaultClass.COMMUNICATION_HANG
    assert word in verdict.evidence[0]


def test_a_mismatch_of_two_is_decided_by_the_sibling_group_or_left_open() -> None:
    def rank(group: str, name: str) -> dict:
        return dump([entry(0, name, seq=1, group=group, desc="TP", state="scheduled")], groups={group: TP[group]})

    agreeing = [dump([entry(0, "all_gather", seq=1, group="2", desc="TP")], groups={"2": TP["2"]})] * 2
    verdict = of(r0=rank("1", "all_gather"), r1=rank("1", "all_reduce"), r2=agreeing[0], r3=agreeing[1])
    assert verdict.culprit_ranks == (1,)
    alone = {"1": ("TP", [0, 1])}
    both = [
        dump([entry(0, name, seq=1, group="1", desc="TP", state="scheduled")], world=2, groups=alone)
        for name in ("all_gather", "all_reduce")
    ]
    verdict = of(r0=both[0], r1=both[1])
    assert verdict.culprit_ranks == ()
    assert verdict.suspects == (0, 1)


def test_a_receive_waits_for_a_send_that_was_not_posted() -> None:
    verdict = of(
        r0=dump([entry(0, "recv 0<-1", seq=1, state="scheduled")], world=2),
        r1=dump([entry(0, "all_reduce", seq=1, group="5", desc="solo")], world=2, groups={"5": ("solo", [1])}),
    )
    assert verdict.culprit_ranks == (1,)


def test_members_of_a_completed_batch_of_sends_are_not_outstanding() -> None:
    # In a dump of active operations the entry "coalesced" is gone once the batch completed; its members never carry a state.
    batch = [entry(4, "send 0->1", seq=3, state="scheduled"), entry(5, "recv 0<-1", seq=3, state="scheduled")]
    verdict = of(r0=dump(batch, world=2), r1=dump([], world=2))
    assert verdict.fault_class is FaultClass.HEALTHY
    pending = [*batch, entry(6, "coalesced", seq=3, state="scheduled", is_p2p=True, p2p_seq_id=3)]
    other = dump([entry(0, seq=1, group="7", desc="solo")], world=2, groups={"7": ("solo", [1])})
    assert of(r0=dump(pending, world=2), r1=other).culprit_ranks == (1,)


def test_everything_completed_is_healthy() -> None:
    verdict = of(**{f"r{rank}": dump([entry(0, seq=1), entry(1, seq=2)]) for rank in range(4)})
    assert verdict.fault_class is FaultClass.HEALTHY
    assert verdict.process_group is None


@pytest.mark.parametrize("version", ["1.0", "1.5", "2.0"])
def test_older_schemas_say_the_same(version: str) -> None:
    waiting = [entry(0, seq=1), entry(1, seq=2, state="scheduled")]
    dumps = {f"r{rank}": old(waiting, version) for rank in (0, 1, 3)}
    verdict = of(**dumps, r2=old(waiting[:1], version))
    assert verdict.culprit_ranks == (2,)


def test_a_group_name_that_two_groups_share_is_told_apart_by_ranks() -> None:
    waiting = [entry(0, seq=1, group="7", desc="TP"), entry(1, seq=2, group="7", desc="TP", state="scheduled")]
    low, high = {"7": ("TP", [0, 1])}, {"7": ("TP", [2, 3])}
    complete = [entry(0, seq=1, group="7", desc="TP")]
    verdict = of(
        r0=dump(waiting, groups=low),
        r1=dump(waiting[:1], groups=low),
        r2=dump(complete, groups=high),
        r3=dump(complete, groups=high),
    )
    assert verdict.culprit_ranks == (1,)


GLOO = """
import faulthandler, os, sys, time
faulthandler.dump_traceback_later(120, exit=True)
import torch, torch.distributed as dist
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/.store", rank=rank, world_size=2)
for _ in range(3):
    dist.all_reduce(torch.ones(4))
if rank == 0:
    work = dist.all_reduce(torch.ones(4), async_op=True)
core = torch._C._distributed_c10d
open(f"{folder}/_dump_{rank}", "wb").write(core._dump_fr_trace(includeStackTraces=False))
open(f"{folder}/json/rank_{rank}.json", "wb").write(core._dump_fr_trace_json())
open(f"{folder}/.done{rank}", "w").close()
while not all(os.path.exists(f"{folder}/.done{other}") for other in range(2)):
    time.sleep(0.01)
os._exit(0)
"""


def test_real_dumps_of_gloo_name_the_rank_that_skipped(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    environment = {**os.environ, "TORCH_FR_BUFFER_SIZE": "100", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "stderr.log").open("wb") as errors:
        runs = [
            subprocess.Popen([sys.executable, "-c", GLOO, str(rank), str(tmp_path)], env=environment, stderr=errors)
            for rank in range(2)
        ]
    try:
        codes = [run.wait(timeout=150) for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.wait()
    assert codes == [0, 0], (tmp_path / "stderr.log").read_text()
    for folder in (tmp_path, tmp_path / "json"):
        dumps = load_folder(folder)
        assert sorted(dumps.dumps) == [0, 1]
        verdict = diagnose(dumps)
        assert verdict.culprit_ranks == (1,)
        assert verdict.collective == "all_reduce"
        assert verdict.sequence == 4
    assert json.loads((tmp_path / "json" / "rank_0.json").read_text())["entries"]
