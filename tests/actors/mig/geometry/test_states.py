"""States of a GPU against brute force: every subset of placements painted on memory slices, and random creates and destroys."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from actors.mig.geometry import (
    GPUS,
    GeometryError,
    GpuState,
    IllegalPlacement,
    UnknownGpu,
    UnknownProfile,
    all_states,
    check_compute,
    gpu_geometry,
    layouts_by_multiset,
    maximal_multisets,
    maximal_states,
    multiset,
    place_compute,
)
from benchmarks.migperf.geometry import FOUR_SLICES, SEVEN_SLICES, GeometryErrors, compare_random, compare_states

BASE = {"1g", "2g", "3g", "4g", "7g"}


def only(gpu: str, kinds: set[str]):
    geometry = gpu_geometry(gpu)
    return geometry.restricted({profile.name for profile in geometry.profiles if profile.kind in kinds})


@pytest.mark.parametrize("gpu, table", [("H100-80GB", SEVEN_SLICES), ("A30", FOUR_SLICES)])
def test_the_states_are_exactly_the_subsets_in_which_nothing_overlaps(gpu, table):
    found = compare_states(gpu_geometry(gpu), table)
    assert (found.illegal_accepted, found.legal_rejected) == (0, 0)
    assert found.checks == 2 ** sum(len(starts) for starts, _, _ in table.values())


@pytest.mark.parametrize("gpu, table", [("A100-80GB", SEVEN_SLICES), ("A30", FOUR_SLICES)])
def test_random_creates_and_destroys_agree_with_painted_slices(gpu, table):
    found = compare_random(gpu_geometry(gpu), table, 4000, random.Random(3))
    assert found == GeometryErrors(0, 0, 4000)


def test_the_judge_finds_a_wrong_geometry():
    """A table that lets 3g start anywhere must not pass: else the comparison above says nothing."""
    from dataclasses import replace

    right = gpu_geometry("A100-80GB")
    wrong = replace(
        right, profiles=tuple(replace(p, starts=(0, 2, 4)) if p.kind == "3g" else p for p in right.profiles)
    )
    assert compare_random(wrong, SEVEN_SLICES, 3000, random.Random(0)).illegal_accepted > 0
    fewer = right.restricted({p.name for p in right.profiles})
    fewer = replace(fewer, profiles=tuple(replace(p, starts=(0, 2)) if p.kind == "2g" else p for p in right.profiles))
    assert compare_random(fewer, SEVEN_SLICES, 3000, random.Random(0)).legal_rejected > 0


@pytest.mark.parametrize("gpu, kinds, states, maximal, multisets, maximal_kinds", [
    # Published enumerations: base profiles, with 1g of double memory, with +me; A30 without +me.
    ("A100-80GB", BASE, 298, 19, 38, 14),
    ("A100-80GB", BASE | {"1g.x2"}, 723, 78, 78, 38),
    ("H100-80GB", BASE | {"1g.x2", "1g+me"}, 2319, 239, 128, 64),
    ("A30", {"1g", "2g", "4g"}, 26, 5, 10, 4),
])  # fmt: skip
def test_counts_of_states(gpu, kinds, states, maximal, multisets, maximal_kinds):
    geometry = only(gpu, kinds)
    assert len(all_states(geometry)) == states
    assert len(maximal_states(geometry)) == maximal
    assert len(layouts_by_multiset(geometry)) == multisets
    assert len({multiset(state) for state in maximal_states(geometry)}) == maximal_kinds


def test_undominated_multisets_are_those_that_are_part_of_no_other():
    geometry = only("A100-80GB", BASE)
    every = [Counter(names) for names in layouts_by_multiset(geometry)]
    expected = {tuple(sorted(one.elements())) for one in every if not any(one < other for other in every)}
    assert set(maximal_multisets(geometry)) == expected
    assert (
        len(expected) == 12
    )  # two of the 14 maximal ones waste a memory slice: 3g + three 1g is a part of 3g + four 1g


@pytest.mark.parametrize("gpu", list(GPUS))
def test_every_gpu_of_the_tables_is_consistent(gpu):
    geometry = gpu_geometry(gpu)
    for profile in geometry.profiles:
        fits = 0
        state = GpuState(geometry)
        for start in profile.starts:
            if state.can_place(profile.name, start):
                state = state.place(profile.name, start)
                fits += 1
        assert fits == profile.max_instances == GpuState(geometry).remaining_capacity(profile.name)
    assert len({profile.profile_id for profile in geometry.profiles}) == len(geometry.profiles)
    whole = geometry.profiles[-1]
    assert whole.compute_slices == geometry.compute_slices
    assert whole.memory_slices == geometry.memory_slices


def test_hopper_slices_have_more_sms_than_their_share():
    by_kind = {profile.kind: profile.sm_count for profile in gpu_geometry("H100-80GB").profiles}
    assert (by_kind["3g"], by_kind["1g.x2"], by_kind["7g"]) == (60, 26, 132)


def test_names_of_nvml_and_of_people_find_the_gpu():
    for name, gpu in {
        "NVIDIA A100-SXM4-40GB": "A100-40GB", "NVIDIA A100 80GB PCIe": "A100-80GB", "NVIDIA H100 80GB HBM3": "H100-80GB",
        "NVIDIA H100 NVL": "H100-94GB", "NVIDIA A30": "A30", "NVIDIA H200": "H200", "NVIDIA B200": "B200",
        "a100-80gb": "A100-80GB", "NVIDIA GH200 480GB": "GH200-96GB", "NVIDIA GB200": "GB200",
    }.items():  # fmt: skip
        assert gpu_geometry(name).gpu == gpu
    with pytest.raises(UnknownGpu, match="No MIG table of a GPU 'Tesla T4': known are A30"):
        gpu_geometry("Tesla T4")
    with pytest.raises(UnknownGpu, match="Say which A100 it is"):
        gpu_geometry("A100")
    with pytest.raises(UnknownGpu):
        gpu_geometry("NVIDIA A300")


def test_remaining_capacity_is_the_most_that_can_be_added():
    geometry = gpu_geometry("A100-80GB")
    for state in random.Random(1).sample(all_states(geometry), 25):
        for profile in geometry.profiles:
            most = 0
            for count in range(len(profile.starts) + 1):
                for starts in itertools.combinations(profile.starts, count):
                    try:
                        GpuState.of(geometry, [*state.placements, *[(profile.name, start) for start in starts]])
                    except IllegalPlacement:
                        continue
                    most = max(most, count)
            assert state.remaining_capacity(profile.name) == most


def test_what_cannot_be_says_why():
    state = GpuState.of(gpu_geometry("A100-80GB"), [("2g.20gb", 2), ("1g.10gb+me", 5)])
    assert state.why_not("1g.10gb", 0) is None
    assert state.why_not("3g.40gb", 4) == "3g.40gb at memory slice 4 of A100-80GB overlaps 1g.10gb+me@5."
    assert state.why_not("1g.10gb+me", 0).endswith(
        "another instance has the media extensions, of which the GPU has one set."
    )
    with pytest.raises(IllegalPlacement, match=r"2g\.20gb cannot start at memory slice 1 .* it may start at 0, 2, 4"):
        state.place("2g.20gb", 1)
    with pytest.raises(IllegalPlacement, match=r"There is no 1g\.10gb@0 .* it holds 2g\.20gb@2, 1g\.10gb\+me@5"):
        state.remove("1g.10gb", 0)
    with pytest.raises(UnknownProfile, match=r"A100-80GB has no profile '5g\.40gb': it has 1g\.10gb, "):
        state.can_place("5g.40gb", 0)
    with pytest.raises(GeometryError):
        GpuState.of(gpu_geometry("A30"), [("1g.6gb+me", 0), ("2g.12gb+me", 2)])  # one set of media engines


def test_a_limit_of_compute_slices_binds_where_memory_does_not():
    """No published table needs it, but a driver may report such a GPU."""
    from dataclasses import replace

    geometry = replace(gpu_geometry("A100-80GB"), compute_slices=6)
    state = GpuState.of(geometry, [("4g.40gb", 0)])
    assert (
        state.why_not("3g.40gb", 4)
        == "3g.40gb at memory slice 4 of A100-80GB does not fit: 4 of 6 compute slices are taken."
    )
    assert state.can_place("2g.20gb", 4)
    limited = replace(
        geometry, profiles=tuple(replace(p, max_instances=2) if p.kind == "1g" else p for p in geometry.profiles)
    )
    state = GpuState.of(limited, [("1g.10gb", 0), ("1g.10gb", 5)])
    assert state.remaining_capacity("1g.10gb") == 0
    assert state.why_not("1g.10gb", 3).endswith("the GPU allows 2 of 1g.10gb.")


def test_compute_instances_inside_a_gpu_instance():
    geometry = gpu_geometry("A100-40GB")
    counts = {
        profile.kind: {cut.compute_slices: cut.max_instances for cut in geometry.compute_profiles(profile.name)}
        for profile in geometry.profiles
    }
    assert counts["7g"] == {1: 7, 2: 3, 3: 2, 4: 1, 7: 1}  # nvidia-smi mig -lcip
    assert counts["3g"] == {1: 3, 2: 1, 3: 1}
    assert counts["1g"] == {1: 1}
    assert [cut.name("3g.20gb") for cut in geometry.compute_profiles("3g.20gb")] == [
        "1c.3g.20gb",
        "2c.3g.20gb",
        "3g.20gb",
    ]
    check_compute(geometry, "7g.40gb", place_compute(geometry, "7g.40gb", [1, 2, 3]))
    for sizes in ([4, 4], [2, 2, 2, 2], [7, 1]):
        with pytest.raises(GeometryError, match="do not fit beside each other"):
            place_compute(geometry, "7g.40gb", sizes)
    with pytest.raises(GeometryError, match="overlaps"):
        check_compute(geometry, "4g.20gb", [(2, 0), (1, 1)])
    with pytest.raises(GeometryError, match="it may start at 0, 2"):
        check_compute(geometry, "4g.20gb", [(2, 1)])
    with pytest.raises(GeometryError, match="it has 1c, 2c, 3c"):
        check_compute(geometry, "3g.20gb", [(4, 0)])


@pytest.mark.shared_data
@pytest.mark.parametrize(
    "file, gpu", [("qx-a100.xml", "A100-40GB"), ("qx-h100.xml", "H100-80GB"), ("qx-b200.xml", "B200")]
)
def test_real_nodes_are_recognised_and_their_memory_is_that_of_the_whole_profile(shared_data, file, gpu):
    import xml.etree.ElementTree as ET

    for node in ET.parse(shared_data / "mig" / file).getroot().iter("gpu"):
        geometry = gpu_geometry(node.findtext("product_name"))
        assert geometry.gpu == gpu
        total_mib = int(node.findtext("fb_memory_usage/total").split()[0])
        whole = geometry.profiles[-1]
        assert whole.name.startswith("7g.")
        named = float(whole.name.split(".")[1].removesuffix("gb"))
        assert named == pytest.approx(total_mib / 1024, rel=0.02)
        assert all(
            p.memory_mib is None or p.memory_mib <= total_mib * p.memory_slices / 8 * 1.001 for p in geometry.profiles
        )
