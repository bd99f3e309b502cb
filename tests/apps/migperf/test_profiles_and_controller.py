"""The verbs ``profiles`` and ``controller``, with a double of NVML in place of a GPU; what is amiss is a sentence."""

from __future__ import annotations

import json

import pytest

from actors.mig.controller import SliceTarget
from actors.mig.geometry import GpuState, gpu_geometry
from apps.migperf.controller import Action, parse_target, run_action
from apps.migperf.profiles import find_geometry, parse_layout, profile_rows
from apps.program.errors import UserError
from tests.actors.mig.fake_pynvml import FakeNvml


def test_profiles_beside_what_the_gpu_holds():
    geometry = find_geometry("A100-80GB")
    rows = {row["name"]: row for row in profile_rows(GpuState.of(geometry, parse_layout("3g.40gb@4, 1g.10gb@0")))}
    assert rows["4g.40gb"]["remaining"] == 0
    assert (rows["2g.20gb"]["remaining"], rows["2g.20gb"]["free_starts"]) == (1, [2])
    assert rows["1g.10gb"]["free_starts"] == [1, 2, 3]
    assert rows["3g.40gb"]["compute_instances"] == ["1c.3g.40gb x3", "2c.3g.40gb x1", "3g.40gb x1"]
    json.dumps(list(rows.values()))


def test_profiles_of_an_unknown_gpu_or_a_layout_that_is_none():
    with pytest.raises(UserError, match="No MIG table of a GPU 'X9'"):
        find_geometry("X9")
    with pytest.raises(UserError, match="'3g' is not PROFILE@START, as in 3g.40gb@4"):
        parse_layout("3g")


def test_targets_are_read():
    assert parse_target("4g.40gb@0:2c+2c") == SliceTarget("4g.40gb", 0, (2, 2))
    assert parse_target(" 3g.40gb ") == SliceTarget("3g.40gb", None, None)
    for wrong in ("", "@3", "3g.40gb@x", "3g.40gb:2c+x"):
        with pytest.raises(UserError, match=r"is not PROFILE\[@START\]"):
            parse_target(wrong)


def test_a_plan_becomes_a_partition(tmp_path):
    plan = tmp_path / "plan.json"
    segments = [
        {"gpu": 0, "profile": "7g.80gb", "start": 0},
        {"gpu": 1, "profile": "4g.40gb", "start": 0},
        {"gpu": 1, "profile": "3g.40gb", "start": 4},
    ]
    plan.write_text(json.dumps({"gpus": 2, "segments": segments}))
    fake = FakeNvml("A100-80GB")
    dry = run_action(Action.repartition, 0, plan=plan, plan_gpu=1, dry_run=True, module=fake)
    assert len(dry["steps"]) == 4
    assert fake.layout() == []
    done = run_action(Action.repartition, 0, plan=plan, plan_gpu=1, module=fake)
    assert fake.layout() == [("3g", 4, ((3, 0),)), ("4g", 0, ((4, 0),))]
    assert all(row["compute"][0]["uuid"].startswith("MIG-") for row in done["instances"])
    json.dumps(done)
    with pytest.raises(UserError, match="has no GPU 7"):
        run_action(Action.repartition, 0, plan=plan, plan_gpu=7, module=fake)
    plan.write_text("[]")
    with pytest.raises(UserError, match="is no plan"):
        run_action(Action.repartition, 0, plan=plan, module=fake)


def test_create_status_destroy_and_mode():
    fake = FakeNvml("H100-80GB", mig=False)
    assert run_action(Action.status, 0, module=fake)["mig"] is False
    assert run_action(Action.enable, 0, module=fake)["steps"] == ["turn MIG mode of GPU 0 on"]
    made = run_action(Action.create, 0, layout="3g.40gb:1c+2c", module=fake)["instances"][0]
    status = run_action(Action.status, 0, module=fake)
    assert status["instances"] == [made]
    assert "MIG on, 0 processes" in status["title"]
    run_action(Action.destroy, 0, instance=made["id"], module=fake)
    assert fake.layout() == []
    assert fake.initialised == 0


@pytest.mark.parametrize("fake, arguments, sentence", [
    (FakeNvml(library=False), {"action": Action.status}, "There is no NVML library"),
    (FakeNvml("A30"), {"action": Action.status, "gpu": 3}, "There is no GPU 3: this machine has 1 GPU, numbered from 0"),
    (FakeNvml("A30", root=False), {"action": Action.create, "layout": "4g.24gb"}, "needs root"),
    (FakeNvml("A30", mig=False), {"action": Action.create, "layout": "4g.24gb"}, "MIG mode of GPU 0 is off: turn it on first"),
    (FakeNvml("T4"), {"action": Action.enable}, r"GPU 0 \(Tesla T4\) has no MIG"),
    (FakeNvml("A30"), {"action": Action.create, "layout": "3g.24gb"}, "has no profile '3g.24gb': it has 1g.6gb"),
    (FakeNvml("A30"), {"action": Action.create, "layout": "2g.12gb@1"}, "it may start at 0, 2"),
    (FakeNvml("A30"), {"action": Action.create, "layout": "1g.6gb,1g.6gb"}, "makes one instance"),
    (FakeNvml("A30"), {"action": Action.create}, "create needs --layout"),
    (FakeNvml("A30"), {"action": Action.destroy}, "destroy needs --instance ID"),
    (FakeNvml("A30"), {"action": Action.destroy, "instance": 5}, "has no GPU instance 5: it has none"),
    (FakeNvml("A30"), {"action": Action.repartition}, "either --layout or --plan"),
])  # fmt: skip
def test_what_stands_in_the_way_is_a_sentence(fake, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        run_action(arguments.pop("action"), arguments.pop("gpu", 0), **arguments, module=fake)
    assert all(fake.layout(number) == [] for number in range(len(fake.gpus)))
    assert fake.initialised == 0


def test_a_busy_gpu_is_refused():
    fake = FakeNvml("A100-80GB")
    fake.processes = [(99, 0, None)]
    with pytest.raises(UserError, match="GPU 0 is busy: end process 99 first"):
        run_action(Action.repartition, 0, layout="7g.80gb", module=fake)
    assert gpu_geometry("A100-80GB").gpu == "A100-80GB"
