"""What a profile's name stands for on each GPU; shares worked by hand from NVIDIA's tables."""

from __future__ import annotations

import pytest

from actors.mig.prediction import PredictionError, parse_slice


@pytest.mark.parametrize(
    ("gpu", "profile", "sms", "sm_share", "bandwidth_share", "memory_mib"),
    [
        ("A100-40GB", "1g.5gb", 14, 14 / 108, 1 / 8, 4864),
        ("A100-40GB", "1g.10gb", 14, 14 / 108, 2 / 8, 9851),
        ("A100-80GB", "1g.10gb+me", 14, 14 / 108, 1 / 8, 9851),
        ("A100-80GB", "3g.40gb", 42, 42 / 108, 4 / 8, 40192),
        ("A100-80GB", "4g.40gb", 56, 56 / 108, 4 / 8, 40192),
        ("A100-80GB", "7g.80gb", 98, 98 / 108, 1.0, 80384),
        ("A100-80GB", "full", 108, 1.0, 1.0, 80384),
        ("NVIDIA A100-SXM4-40GB", "MIG 2g.10gb", 28, 28 / 108, 2 / 8, 9851),
        ("H100-80GB", "1g.20gb", 26, 26 / 132, 2 / 8, 20091),
        ("H100-80GB", "3g.40gb", 60, 60 / 132, 4 / 8, 40448),
        ("NVIDIA H100 80GB HBM3", "no-MIG", 132, 1.0, 1.0, 81152),
        ("A30", "2g.12gb", 28, 0.5, 0.5, 11971),
        ("A30", "4g.24gb", 56, 1.0, 1.0, 24003),
    ],
)
def test_slices_of_the_tables(gpu, profile, sms, sm_share, bandwidth_share, memory_mib):
    part = parse_slice(gpu, profile)
    assert (part.sms, part.sm_share, part.bandwidth_share) == (sms, pytest.approx(sm_share), bandwidth_share)
    assert part.memory_mib == pytest.approx(memory_mib, abs=1)


def test_names_of_other_drivers_mean_the_same_slice():
    assert parse_slice("GB200", "1g.23gb").sms == parse_slice("GB200", "1g.24gb").sms
    assert parse_slice("H100-94GB", "1g.11gb").bandwidth_share == 1 / 8


@pytest.mark.parametrize("gpu", ["H100-80GB", "H200", "B200", "GB200", "GH200-96GB", "A100-80GB", "A30"])
def test_every_gpu_has_growing_slices_even_where_numbers_are_not_published(gpu):
    from actors.mig.geometry import gpu_geometry

    parts = [parse_slice(gpu, profile.name) for profile in gpu_geometry(gpu).profiles if "me" not in profile.name]
    parts.append(parse_slice(gpu, "full"))
    assert all(0 < part.sm_share <= 1 and part.memory_mib > 4000 for part in parts)
    by_sms = sorted(parts, key=lambda part: (part.sms, part.memory_mib))
    assert [part.memory_mib for part in by_sms] == sorted(part.memory_mib for part in parts)


@pytest.mark.parametrize(
    ("gpu", "profile", "sentence"),
    [
        ("T4", "full", "T4"),
        ("A100", "1g.5gb", "A100-40GB or A100-80GB"),
        ("A100-80GB", "5g.40gb", "no profile of A100-80GB: it has 1g.10gb"),
        ("A100-80GB", "1g.5gb", "no profile of A100-80GB"),
        ("A30", "3g.20gb", "no profile of A30"),
        ("A100-80GB", "big", "'big' is no profile"),
        ("A100-80GB", "", "'' is no profile"),
    ],
)
def test_what_is_unknown_is_named(gpu, profile, sentence):
    with pytest.raises(PredictionError, match=sentence):
        parse_slice(gpu, profile)
