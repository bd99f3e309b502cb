"""The verb ``plan``: a legal plan that covers the demands, judged from the files alone; mistakes are sentences."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from pathlib import Path

import pytest

from apps.migperf.demand import read_profiles
from apps.migperf.plan import plan
from apps.program.cli import program

# Memory slices of a GPU with seven compute slices, from `nvidia-smi mig -lgipp`: profile's first character -> (starts, size).
PLACES = {"1": ((0, 1, 2, 3, 4, 5, 6), 1), "2": ((0, 2, 4), 2), "3": ((0, 4), 4), "4": ((0,), 4), "7": ((0,), 8)}
PROFILES = """gpu,mode,workload,batch,processes,profile,latency_ms,throughput_per_s,oom
A100-80GB,infer,net,1,1,1g.10gb,10.0,100.0,0
A100-80GB,infer,net,1,2,1g.10gb,16.0,62.5,0
A100-80GB,infer,net,1,3,1g.10gb,,,1
A100-80GB,infer,net,8,1,1g.10gb,60.0,133.3,0
A100-80GB,infer,net,1,1,2g.20gb,8.0,125.0,0
A100-80GB,infer,net,1,3,3g.40gb,12.0,83.3,0
A100-80GB,infer,big,1,1,7g.80gb,30.0,33.3,0
A100-80GB,train,net,16,1,2g.20gb,200.0,80.0,0
A100-80GB,train,net,16,1,4g.40gb,100.0,160.0,0
"""


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the verb on texts or files: (exit code, stdout, stderr)."""

    def go(profiles: str | Path, demand: str, *arguments: str):
        for name, text in (("p.csv", profiles), ("d.csv", demand)):
            if isinstance(text, str):
                (tmp_path / name).write_text(text)
        app = program("migperf", "test")
        app.verb(plan)
        path = profiles if isinstance(profiles, Path) else tmp_path / "p.csv"
        code = app.run(["plan", "--profiles", str(path), "--demand", str(tmp_path / "d.csv"), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return go


def judge(printed: dict, profiles: list[dict], demands: list[dict], share: float = 0.5) -> None:
    """Legal places, segments as measured, demands covered: from the tables, without the code under test."""
    taken = defaultdict(set)
    served = defaultdict(float)
    for segment in printed["segments"]:
        starts, size = PLACES[segment["profile"][0]]
        assert segment["start"] in starts
        span = set(range(segment["start"], segment["start"] + size))
        assert not span & taken[segment["gpu"]]
        taken[segment["gpu"]] |= span
        (row,) = [
            row
            for row in profiles
            if row["workload"] == segment["workload"]
            and row["mode"] == segment["mode"]
            and row["profile"] == segment["profile"]
            and (int(row["batch"]), int(row["processes"])) == (segment["batch"], segment["processes"])
        ]
        assert row["oom"] == "0"
        assert segment["latency_ms"] == float(row["latency_ms"])
        total = float(row["throughput_per_s"]) * int(row["processes"])
        assert segment["throughput_per_s"] == pytest.approx(total)
        served[segment["workload"]] += total
    assert set(taken) == set(range(printed["gpus"]))
    assert printed["lower_bound"] <= printed["gpus"]
    for demand in demands:
        assert served[demand["workload"]] >= float(demand["requests_per_s"]) * (1 - 1e-9)
        limit = float(demand["latency_limit_ms"]) * share
        assert all(s["latency_ms"] <= limit for s in printed["segments"] if s["workload"] == demand["workload"])


def rows(text: str) -> list[dict]:
    return list(csv.DictReader(text.splitlines()))


def test_a_plan_by_hand(run):
    """A limit of 40 ms lets 20 ms through: two processes on 1g serve 125/s (not 62.5), so 7 x 125 = 875/s fill one GPU."""
    demand = "workload,requests_per_s,latency_limit_ms\nnet,875,40\n"
    code, out, _ = run(PROFILES, demand, "--json")
    printed = json.loads(out)
    assert code == 0
    assert (printed["gpus"], printed["lower_bound"], printed["gap"]) == (1, 1, 0)
    assert {(s["profile"], s["batch"], s["processes"]) for s in printed["segments"]} == {("1g.10gb", 1, 2)}
    judge(printed, rows(PROFILES), rows(demand))
    two = json.loads(run(PROFILES, demand.replace("875", "875.5"), "--json")[1])
    assert (two["gpus"], two["lower_bound"]) == (2, 2)


def test_throughput_is_of_one_process(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(PROFILES)
    measured, _ = read_profiles(path)
    assert {(row.processes, row.throughput_per_s) for row in measured if row.profile == "3g.40gb"} == {(3, 3 * 83.3)}
    assert len(measured) == 8  # the row that ran out of memory serves nothing


@pytest.mark.shared_data
def test_the_shared_profiles_say_throughput_of_one_process_too(shared_data):
    """batch / latency of one process, whatever their number: were it the slice's, more processes could only lose."""
    ratios = [
        float(row["throughput_per_s"]) * float(row["latency_ms"]) / 1000 / int(row["batch"])
        for row in csv.DictReader((shared_data / "mig" / "parvagpu.csv").open())
        if row["oom"] == "0" and row["processes"] != "1" and float(row["latency_ms"]) > 20
    ]
    assert len(ratios) > 300
    assert all(math.isclose(ratio, 1.0, abs_tol=0.06) for ratio in ratios)


@pytest.mark.shared_data
def test_a_plan_over_the_shared_profiles(run, shared_data):
    path = shared_data / "mig" / "parvagpu.csv"
    demand = "workload,requests_per_s,latency_limit_ms\nbert,300,700\nresnet50,4000,120\nvgg16,2500.5,250\ninceptionv3,900,400\n"
    code, out, _ = run(path, demand, "--json")
    assert code == 0
    printed = json.loads(out)
    assert printed["gpus"] == printed["lower_bound"] >= 3
    judge(printed, list(csv.DictReader(path.open())), rows(demand))


def test_a_training_job_in_the_demand_has_no_limit(run):
    demand = "workload,requests_per_s,latency_limit_ms,mode\nnet,100,,train\n"
    printed = json.loads(run(PROFILES, demand, "--json")[1])
    assert [(s["mode"], s["profile"]) for s in printed["segments"]] == [("train", "4g.40gb")]


def test_the_table_and_the_options(run):
    demand = "workload,requests_per_s,latency_limit_ms\nnet,400,40\n"
    code, out, _ = run(PROFILES, demand, "--heuristic", "--gpus", "A100-80GB=2")
    assert code == 0
    assert "1 x A100-80GB (at least 1 needed" in out
    code, out, _ = run(PROFILES, demand, "--latency-share", "1", "--json")
    assert json.loads(out)["gpus"] == 1
    code, _, err = run(PROFILES, demand.replace("400", "4000"), "--gpus", "A100-80GB=2")
    assert (code, err) == (1, "migperf: The demands need at least 5 GPUs: there are 2.\n")


D = "workload,requests_per_s,latency_limit_ms\n"


@pytest.mark.parametrize("profiles, demand, arguments, sentence", [
    (PROFILES, D + "lstm,5,100\n", (), "no infer measurement of lstm that ran: measured are big, net"),
    (PROFILES, D + "net,5,15\n", (), "No slice meets the latency limit of net: 0.5 of 15 ms are 7.5 ms"),
    (PROFILES, D + "net,0,100\n", (), "line 2: The demand of net is 0 requests per second: it must be a positive number"),
    (PROFILES, D + "net,-3,100\n", (), "is -3 requests per second"),
    (PROFILES, D + "net,nan,100\n", (), "is nan requests per second"),
    (PROFILES, D + "net,many,100\n", (), "line 2: requests_per_s must be a number, not 'many'"),
    (PROFILES, D + "net,,100\n", (), "requests_per_s must be a number, not ''"),
    (PROFILES, D + "net,5,\n", (), "net needs a latency_limit_ms"),
    (PROFILES, D + "net,5,-1\n", (), "The latency limit of net is -1 ms"),
    (PROFILES, D + "net,5\n", (), "it has not 3 cells"),
    (PROFILES, D, (), "hold column names but no rows"),
    (PROFILES, "", (), "are empty: wanted are the columns workload, requests_per_s"),
    (PROFILES, "workload,requests_per_s\nnet,5\n", (), "has no column latency_limit_ms"),
    (PROFILES.replace("throughput_per_s", "speed"), D + "net,5,100\n", (), "has no column throughput_per_s"),
    (PROFILES.replace("A100-80GB", "T4"), D + "net,5,100\n", (), "line 2: No MIG table of a GPU 'T4'"),
    (PROFILES.replace("2g.20gb", "2g.30gb"), D + "net,5,100\n", (), "has no profile '2g.30gb'"),
    (PROFILES.replace("125.0", "nan"), D + "net,5,100\n", (), "must be positive numbers"),
    (PROFILES, D + "net,5,100\n", ("--gpus", "H200=1"), "nothing was measured on H200, only on A100-80GB"),
    (PROFILES, D + "net,5,100\n", ("--gpus", "A100-80GB"), "must be MODEL=COUNT"),
    (PROFILES, D + "net,5,100\n", ("--latency-share", "0"), "must be above 0 and at most 1"),
    (Path("/nowhere/p.csv"), D + "net,5,100\n", (), "do not exist"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(run, profiles, demand, arguments, sentence):
    code, out, err = run(profiles, demand, *arguments)
    assert code == 1
    assert sentence in err
    assert (len(err.splitlines()), out) == (1, "")
