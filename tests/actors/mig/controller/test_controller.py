"""The controller against a double of NVML that keeps MIG's rules: it does what was asked in the fewest steps, or nothing."""

from __future__ import annotations

import random

import pynvml
import pytest

from actors.mig.controller import (
    ControllerError,
    GpuBusy,
    MigController,
    MigOff,
    NoNvml,
    NoPrivilege,
    Nvml,
    RollbackFailed,
    RolledBack,
    SliceTarget,
)
from actors.mig.geometry import GeometryError, GpuState, IllegalPlacement, UnknownProfile, all_states, gpu_geometry
from tests.actors.mig.fake_pynvml import FakeNvml

CHANGING = ("Create", "Destroy", "SetMigMode")


def changes(fake: FakeNvml) -> list[str]:
    return [name for name in fake.calls if any(word in name for word in CHANGING)]


@pytest.fixture
def a100():
    fake = FakeNvml("A100-80GB")
    with Nvml(fake) as nvml:
        yield fake, MigController(nvml)
    assert fake.initialised == 0


def test_geometry_read_from_nvml_is_the_tables():
    for model in ("A100-80GB", "H100-80GB", "A30"):
        with Nvml(FakeNvml(model)) as nvml:
            read = nvml.geometry(nvml.device(0))
        table = gpu_geometry(model)
        keys = (
            "name",
            "nvml_enum",
            "profile_id",
            "compute_slices",
            "memory_slices",
            "starts",
            "max_instances",
            "ofa_count",
        )
        assert sorted([getattr(p, key) for key in keys] for p in read.profiles) == sorted(
            [getattr(p, key) for key in keys] for p in table.profiles
        )
        assert (read.compute_slices, read.memory_slices, read.source) == (
            table.compute_slices,
            table.memory_slices,
            "nvml",
        )


def test_a_driver_without_profile_names_gives_the_same_names():
    with Nvml(FakeNvml("A100-80GB", old_driver=True)) as nvml:
        names = {profile.name for profile in nvml.geometry(nvml.device(0)).profiles}
    assert names == {profile.name for profile in gpu_geometry("A100-80GB").profiles}


def test_create_makes_a_gpu_instance_with_one_compute_instance_and_says_its_uuid(a100):
    fake, controller = a100
    change = controller.create(0, "3g.40gb", 4)
    assert fake.layout() == [("3g", 4, ((3, 0),))]
    (instance,) = change.instances
    assert instance.placement.start == 4
    assert instance.compute[0].uuid.startswith("MIG-")


def test_create_without_a_start_leaves_most_room(a100):
    fake, controller = a100
    controller.create(0, "1g.10gb")
    controller.create(0, "4g.40gb")  # would not fit if the 1g stood in the first half
    assert {(kind, start) for kind, start, _ in fake.layout()} >= {("4g", 0)}


def test_compute_instances_inside_a_gpu_instance(a100):
    fake, controller = a100
    controller.create(0, "7g.80gb", compute=[1, 2, 3])
    assert list(fake.layout()[0][2]) == [(1, 3), (2, 4), (3, 0)]
    uuids = [ci.uuid for ci in controller.status(0).instances[0].compute]
    assert len(set(uuids)) == 3
    assert all(uuids)


def test_destroy_takes_compute_instances_first(a100):
    fake, controller = a100
    made = controller.create(0, "3g.40gb", compute=[1, 1]).instances[0]
    fake.calls.clear()
    controller.destroy(0, made.id)
    assert fake.layout() == []
    assert changes(fake) == ["nvmlComputeInstanceDestroy", "nvmlComputeInstanceDestroy", "nvmlGpuInstanceDestroy"]


def test_destroy_of_an_instance_that_vanished_says_which_there_are(a100):
    _, controller = a100
    controller.create(0, "2g.20gb", 2)
    with pytest.raises(ControllerError, match=r"no GPU instance 99: it has \d+ \(2g\.20gb@2\)"):
        controller.destroy(0, 99)


def test_repartition_keeps_what_it_can(a100):
    fake, controller = a100
    controller.repartition(0, [SliceTarget("3g.40gb", 4), SliceTarget("2g.20gb", 0), SliceTarget("1g.10gb", 2)])
    kept = {i.placement: i.compute[0].uuid for i in controller.status(0).instances}
    fake.calls.clear()
    change = controller.repartition(0, [SliceTarget("4g.40gb"), SliceTarget("3g.40gb")])
    assert fake.layout() == [("3g", 4, ((3, 0),)), ("4g", 0, ((4, 0),))]
    after = {i.placement: i.compute[0].uuid for i in change.instances}
    assert [place for place in after if kept.get(place) == after[place]] == [
        gpu_geometry("A100-80GB").placement("3g.40gb", 4)
    ]
    assert len(changes(fake)) == 6  # two pairs destroyed, one pair created


def test_a_new_compute_cut_leaves_the_gpu_instance_alone(a100):
    fake, controller = a100
    first = controller.create(0, "4g.40gb").instances[0]
    fake.calls.clear()
    again = controller.repartition(0, [SliceTarget("4g.40gb", compute=(2, 2))]).instances[0]
    assert again.id == first.id
    assert "nvmlGpuInstanceDestroy" not in fake.calls
    assert fake.layout() == [("4g", 0, ((2, 0), (2, 2)))]


def test_the_same_partition_is_no_work(a100):
    fake, controller = a100
    controller.repartition(0, [SliceTarget("3g.40gb"), SliceTarget("3g.40gb", compute=(1, 2))])
    fake.calls.clear()
    change = controller.repartition(0, [SliceTarget("3g.40gb", compute=(2, 1)), SliceTarget("3g.40gb")])
    assert change.steps == ()
    assert changes(fake) == []


def test_a_dry_run_says_the_steps_and_changes_nothing(a100):
    fake, controller = a100
    controller.create(0, "2g.20gb", 0)
    fake.calls.clear()
    change = controller.repartition(0, [SliceTarget("4g.40gb")], dry_run=True)
    assert [str(step) for step in change.steps] == [
        "destroy compute instance of 2 slices at 0 in 2g.20gb at memory slice 0",
        "destroy GPU instance 2g.20gb at memory slice 0",
        "create GPU instance 4g.40gb at memory slice 0",
        "create compute instance of 4 slices at 0 in 4g.40gb at memory slice 0",
    ]
    assert changes(fake) == []
    assert fake.layout() == [("2g", 0, ((2, 0),))]


@pytest.mark.parametrize("target", [
    [SliceTarget("4g.40gb"), SliceTarget("4g.40gb")],
    [SliceTarget("3g.40gb", 2)],
    [SliceTarget("3g.40gb", 0), SliceTarget("2g.20gb", 2)],
    [SliceTarget("1g.10gb+me"), SliceTarget("1g.10gb+me")],
    [SliceTarget("5g.50gb")],
    [SliceTarget("3g.40gb", compute=(2, 2))],
    [SliceTarget("4g.40gb", compute=(7,))],
])  # fmt: skip
def test_an_illegal_target_touches_nothing(a100, target):
    fake, controller = a100
    controller.create(0, "1g.10gb", 6)
    before = fake.layout()
    fake.calls.clear()
    with pytest.raises(GeometryError):
        controller.repartition(0, target)
    assert fake.layout() == before
    assert changes(fake) == []


def test_an_illegal_placement_says_what_is_in_the_way(a100):
    _, controller = a100
    controller.create(0, "2g.20gb", 2)
    with pytest.raises(IllegalPlacement, match=r"4g\.40gb at memory slice 0 .* overlaps 2g\.20gb@2"):
        controller.create(0, "4g.40gb", 0)
    with pytest.raises(UnknownProfile, match=r"no profile '9g\.90gb': it has 1g\.10gb"):
        controller.create(0, "9g.90gb")


@pytest.mark.parametrize("function, number", [
    ("nvmlDeviceCreateGpuInstanceWithPlacement", 1),
    ("nvmlDeviceCreateGpuInstanceWithPlacement", 2),
    ("nvmlGpuInstanceCreateComputeInstanceWithPlacement", 1),
    ("nvmlGpuInstanceCreateComputeInstanceWithPlacement", 2),
    ("nvmlGpuInstanceCreateComputeInstanceWithPlacement", 4),
    ("nvmlComputeInstanceDestroy", 1),
    ("nvmlComputeInstanceDestroy", 3),
    ("nvmlGpuInstanceDestroy", 1),
    ("nvmlGpuInstanceDestroy", 2),
])  # fmt: skip
def test_a_step_that_fails_is_undone_with_all_before_it(a100, function, number):
    fake, controller = a100
    controller.repartition(
        0, [SliceTarget("2g.20gb", 0), SliceTarget("1g.10gb", 2), SliceTarget("3g.40gb", 4, compute=(1, 1, 1))]
    )
    before = fake.layout()
    fake.fail[function] = (number, pynvml.NVML_ERROR_UNKNOWN)
    fake.calls.clear()
    wanted = [SliceTarget("4g.40gb", 0, (2, 2)), SliceTarget("2g.20gb", 4), SliceTarget("1g.10gb", 6)]
    with pytest.raises(ControllerError) as caught:
        controller.repartition(0, wanted)
    assert fake.fail[function][0] == 0, "the failure never happened"
    assert fake.layout() == before
    first = changes(fake)[0] == function and number == 1
    assert isinstance(caught.value, RolledBack) != first
    assert "Could not" in str(caught.value)


def test_a_driver_with_other_compute_places_than_the_tables_chooses_itself(a100, monkeypatch):
    from tests.actors.mig import fake_pynvml

    monkeypatch.setitem(fake_pynvml.COMPUTE, 2, (1, 3))  # 2c at 0 and 3, where the tables say 0, 2, 4
    fake, controller = a100
    controller.create(0, "7g.80gb", compute=(2, 2))
    assert fake.layout() == [("7g", 0, ((2, 0), (2, 3)))]
    controller.repartition(0, [])
    fake.fail["nvmlGpuInstanceCreateComputeInstance"] = (2, pynvml.NVML_ERROR_UNKNOWN)
    with pytest.raises(RolledBack):
        controller.create(0, "7g.80gb", compute=(2, 2, 2))
    assert fake.layout() == []


def test_a_rollback_that_fails_says_what_the_gpu_holds(a100):
    fake, controller = a100
    controller.create(0, "3g.40gb", 4)
    fake.fail["nvmlDeviceCreateGpuInstanceWithPlacement"] = (1, pynvml.NVML_ERROR_UNKNOWN)
    original = fake.nvmlDeviceCreateGpuInstanceWithPlacement

    def never(device, profileId, placement):
        fake.fail["nvmlDeviceCreateGpuInstanceWithPlacement"] = (1, pynvml.NVML_ERROR_GPU_IS_LOST)
        return original(device, profileId, placement)

    fake.nvmlDeviceCreateGpuInstanceWithPlacement = never
    with pytest.raises(RollbackFailed, match="now holds nothing"):
        controller.repartition(0, [SliceTarget("7g.80gb")])


def test_a_busy_gpu_is_not_touched(a100):
    fake, controller = a100
    made = controller.create(0, "3g.40gb", 4).instances[0]
    fake.processes = [(4711, 0, made.id)]
    fake.calls.clear()
    for attempt in (
        lambda: controller.create(0, "1g.10gb"),
        lambda: controller.destroy(0, made.id),
        lambda: controller.repartition(0, []),
        lambda: controller.set_mig_mode(0, False),
    ):
        with pytest.raises(GpuBusy, match="GPU 0 is busy: end process 4711 first"):
            attempt()
    assert changes(fake) == []


def test_what_runs_may_be_kept_while_the_rest_is_cut(a100):
    fake, controller = a100
    made = controller.repartition(0, [SliceTarget("3g.40gb", 4), SliceTarget("2g.20gb", 0)]).instances
    running = next(instance for instance in made if instance.placement.start == 4)
    fake.processes = [(4711, 0, running.id)]
    controller.repartition(0, [SliceTarget("3g.40gb"), SliceTarget("4g.40gb")], keep_running=True)
    assert fake.layout() == [("3g", 4, ((3, 0),)), ("4g", 0, ((4, 0),))]
    with pytest.raises(GeometryError, match=r"do not fit on one .* with 3g\.40gb@4"):
        controller.repartition(0, [SliceTarget("7g.80gb")], keep_running=True)
    with pytest.raises(GpuBusy, match=r"processes run in 3g\.40gb@4"):
        controller.repartition(0, [SliceTarget("3g.40gb", compute=(1, 2))], keep_running=True)
    fake.processes = [(4712, 0, None)]
    with pytest.raises(GpuBusy, match="4712"):
        controller.repartition(0, [SliceTarget("3g.40gb")], keep_running=True)


def test_mig_mode_of_an_h100_changes_at_once_and_off_destroys_first():
    fake = FakeNvml("H100-80GB", mig=False)
    with Nvml(fake) as nvml:
        controller = MigController(nvml)
        with pytest.raises(MigOff, match="MIG mode of GPU 0 is off: turn it on first"):
            controller.create(0, "1g.10gb")
        assert controller.set_mig_mode(0, True) == ("turn MIG mode of GPU 0 on",)
        assert controller.set_mig_mode(0, True) == ()
        controller.create(0, "1g.20gb")
        assert len(controller.set_mig_mode(0, False, dry_run=True)) == 3
        assert controller.status(0).mig is True
        controller.set_mig_mode(0, False)
        assert controller.status(0).mig is False
        assert fake.layout() == []


def test_mig_mode_of_an_a100_waits_for_a_reset():
    fake = FakeNvml("A100-80GB", mig=False)
    with Nvml(fake) as nvml:
        controller = MigController(nvml)
        with pytest.raises(MigOff, match=r"will be on after a reset.*--gpu-reset -i 0"):
            controller.set_mig_mode(0, True)
        with pytest.raises(MigOff, match="off: reset it"):
            controller.create(0, "1g.10gb")
        fake.reset(0)
        controller.create(0, "1g.10gb")


def test_no_library_no_gpu_no_mig_no_privilege():
    with pytest.raises(NoNvml, match=r"no NVML library \(libnvidia-ml\.so\.1\)"):
        Nvml(FakeNvml(library=False)).__enter__()
    with Nvml(FakeNvml()) as nvml, pytest.raises(NoNvml, match="this machine has no GPU"):
        MigController(nvml).status(0)
    with Nvml(FakeNvml("A30", "T4")) as nvml:
        controller = MigController(nvml)
        with pytest.raises(NoNvml, match="has 2 GPUs, numbered from 0"):
            controller.status(2)
        assert controller.status(1).mig is None
        with pytest.raises(MigOff, match=r"GPU 1 \(Tesla T4\) has no MIG"):
            controller.create(1, "1g.6gb")
    fake = FakeNvml("H100-80GB", root=False)
    with Nvml(fake) as nvml, pytest.raises(NoPrivilege, match="needs root"):
        MigController(nvml).create(0, "1g.10gb")
    assert changes(fake) == []


def test_the_real_module_without_a_driver_says_so():
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        with pytest.raises(NoNvml, match="NVML library|driver"):
            Nvml().__enter__()
    else:
        pynvml.nvmlShutdown()
        with Nvml() as nvml:
            assert nvml.module is pynvml


@pytest.mark.parametrize("model", ["A30", "H100-80GB"])
def test_random_changes_agree_with_the_hardware_rules(model):
    """Geometry and the double were written apart: whatever the geometry allows the double must do, and the reverse."""
    rng = random.Random(7)
    fake = FakeNvml(model)
    table = gpu_geometry(model)
    with Nvml(fake) as nvml:
        controller = MigController(nvml)
        for _ in range(60):
            state = rng.choice(all_states(table))
            controller.repartition(0, [SliceTarget(place.profile, place.start) for place in state.placements])
            held = [instance.placement for instance in controller.status(0).instances]
            assert tuple(held) == tuple(sorted(state.placements))
            device = nvml.device(0)
            now = GpuState.of(table, held)
            for profile in table.profiles:
                capacity = fake.nvmlDeviceGetGpuInstanceRemainingCapacity(device, profile.profile_id)
                assert now.remaining_capacity(profile.name) == capacity, (now, profile.name)
