"""Out of memory: from a measured frame buffer, from what fitted and what did not, and from nothing."""

from __future__ import annotations

import numpy as np
import pytest

from actors.mig.prediction import Measurement, parse_slice
from actors.mig.prediction.memory import CONTEXT_MIB_PER_SM, fit_memory

GPU = "A100-40GB"


def _row(profile, batch, *, oom=None, fb=None, mode="train", processes=1):
    latency = None if oom or (oom is None and fb is None) else 10.0
    row = Measurement(GPU, mode, "net", profile, batch, processes=processes, latency_ms=latency, fb_mib=fb, oom=oom)
    return row, parse_slice(GPU, profile)


def _use(batch, sms, base=1500.0, slope=150.0):
    return base + CONTEXT_MIB_PER_SM * sms + slope * batch


def test_measured_use_is_found_again():
    known = [_row("7g.40gb", batch, fb=_use(batch, 98), oom=False) for batch in (8, 16, 32, 64)]
    model = fit_memory(known)
    assert np.exp(model.base[0]) == pytest.approx(1500, rel=0.05)
    assert np.exp(model.slope[0]) == pytest.approx(150, rel=0.05)


def test_what_needs_more_than_the_slice_has_runs_out():
    known = [_row("7g.40gb", batch, fb=_use(batch, 98), oom=False) for batch in (8, 16, 32, 64)]
    chance = fit_memory(known).probability([_row("1g.5gb", batch) for batch in (1, 4, 8, 32, 64)])
    assert chance[0] < 0.01
    assert chance[-1] > 0.99
    assert np.all(np.diff(chance) >= 0)
    on_larger = fit_memory(known).probability([_row(name, 32) for name in ("1g.5gb", "2g.10gb", "3g.20gb", "7g.40gb")])
    assert np.all(np.diff(on_larger) <= 0)


def test_known_limits_teach_the_peak():
    sweep = [_row("7g.40gb", batch, fb=_use(batch, 98), oom=False) for batch in (8, 16, 32, 64)]
    asked = [_row("1g.5gb", 12)]
    tight = [*sweep, _row("2g.10gb", 32, fb=_use(32, 28), oom=False), _row("2g.10gb", 50, fb=_use(50, 28), oom=False)]
    hungry = [*sweep, _row("2g.10gb", 32, oom=True)]
    assert fit_memory(tight).probability(asked) < 0.1
    assert fit_memory(hungry).probability(asked) > fit_memory(sweep).probability(asked)
    assert fit_memory(hungry).probability([_row("1g.5gb", 16)]) > 0.9


def test_limits_alone_suffice_where_nothing_was_measured():
    known = [_row("2g.10gb", batch, oom=batch >= 64, mode="infer") for batch in (8, 16, 32, 64, 128)]
    chance = fit_memory(known).probability([_row("1g.5gb", batch, mode="infer") for batch in (1, 64, 128)])
    assert chance[0] < 0.3
    assert chance[1] > 0.9
    assert fit_memory(known).probability([_row("7g.40gb", 64, mode="infer")])[0] < 0.1


def test_processes_add_up():
    known = [_row("7g.40gb", batch, fb=_use(batch, 98), oom=False) for batch in (8, 16, 32)]
    chance = fit_memory(known).probability([_row("2g.10gb", 8, processes=count) for count in (1, 2, 6)])
    assert chance[0] < 0.05
    assert chance[2] > 0.95


def test_one_stale_row_does_not_outvote_the_others():
    known = [_row("2g.10gb", batch, oom=batch >= 64, mode="infer") for batch in (16, 32, 64, 128)]
    stale = [_row("2g.10gb", 128, oom=False, mode="infer")]
    assert fit_memory([*known, *stale]).probability([_row("1g.5gb", 64, mode="infer")])[0] > 0.8
