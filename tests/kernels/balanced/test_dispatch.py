"""The dispatcher's table: what it answers between its entries, how it is kept, and that a broken one costs nothing but speed."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from kernels import build
from kernels.balanced import BalancedFormatError, __main__, balanced_linear, calibrate, dispatch, pack
from kernels.balanced.dispatch import ALWAYS, Regime, Table
from tests.kernels.balanced.world import needs_cpp, randn


def regime(density: float, size: float, index: str = "bitmap/2") -> Regime:
    return Regime("fp32", "fp32", index, density, size)


MEASURED = Table(
    ((regime(0.25, 18), 8), (regime(0.25, 24), ALWAYS), (regime(0.5, 18), 2), (regime(0.5, 24), 32)), "by hand"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder of the dispatcher."""
    monkeypatch.setattr(dispatch, "table_path", lambda threads=None: tmp_path / "balanced" / "table.json")
    dispatch.reset()
    yield tmp_path / "balanced" / "table.json"
    monkeypatch.undo()
    dispatch.reset()


@pytest.mark.parametrize(
    ("density", "size", "dense_from"),
    [
        (0.25, 18, 8),
        (0.25, 24, ALWAYS),
        (0.25, 21, 8),  # the more careful of the two sizes
        (0.1, 30, ALWAYS),
        (0.3, 24, 32),  # the next denser one
        (0.5, 10, 2),
        (0.75, 24, 1),  # denser than anything measured
    ],
)
def test_between_measurements_the_careful_one_counts(density, size, dense_from):
    assert MEASURED.lookup(regime(density, size)) == dense_from


def test_a_kernel_that_was_not_measured_has_a_default():
    other = regime(0.5, 24, "8-bit/4")
    assert MEASURED.lookup(other) == dispatch.default_dense_from(other)
    assert dispatch.default_dense_from(regime(1.0, 24)) == 1  # as many bytes as dense and more
    assert dispatch.default_dense_from(regime(0.1, 24, "8-bit/2")) == ALWAYS


def test_a_table_is_kept_and_used(cache):
    packed = pack(randn(64, 64), 16, 32)
    table = Table(((dispatch.regime_of(packed.spec, torch.float32), 5),), "by hand")
    dispatch.save(table, cache)
    dispatch.reset()
    assert dispatch.table() == table
    if dispatch._dense_from(packed, torch.float32) != 1:  # there is a compiler
        assert [dispatch.choose(packed, batch, torch.float32) for batch in (1, 4, 5, 9)] == ["sparse"] * 2 + [
            "dense"
        ] * 2
    assert dispatch.choose(packed, 1, torch.float64) == "dense"  # there is no sparse kernel of it


BROKEN = (
    "",
    "{",
    "[]",
    json.dumps({"version": 99, "rows": [], "source": ""}),
    json.dumps({"version": dispatch.VERSION, "source": "x", "rows": [{"dense_from": 0}]}),
)


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_table_is_said_and_not_used(cache, text, caplog):
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    with pytest.raises(BalancedFormatError):
        dispatch.read(cache)
    with caplog.at_level(logging.WARNING, logger="sextant.kernels"):
        packed, x = pack(randn(64, 64), 16, 32), randn(1, 64)
        y = balanced_linear(x, packed)
    assert dispatch.table().source == "defaults"
    assert torch.allclose(y, x @ packed.unpack().T, atol=1e-5)


@needs_cpp
def test_the_program_measures_and_keeps_a_table(cache, monkeypatch, capsys):
    few = [("fp32", torch.float32, 16, 32, 64), ("int8", torch.float32, 2, 16, 64)]
    monkeypatch.setattr(calibrate, "regimes", lambda quick: iter(few))
    monkeypatch.setattr(calibrate, "BATCHES", (1, 2))
    assert __main__.main(["--quick"]) == 0
    assert "2/2" in capsys.readouterr().out
    table = dispatch.read(cache)
    assert [entry.index for entry, _ in table.dense_from] == ["bitmap/2", "4-bit/1"]
    assert all(batch >= 1 for _, batch in table.dense_from)


def test_tables_of_other_thread_counts_lie_apart():
    if not build.load("balanced"):
        pytest.skip("no C++ compiler")
    assert dispatch.table_path(1) != dispatch.table_path(2)
