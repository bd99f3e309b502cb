"""The GPU dispatcher: what its table answers between measurements, how it is kept, its defaults, and life without a GPU."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch

from kernels.balanced import (
    BalancedFormatError,
    BalancedSpec,
    __main__,
    balanced_linear,
    dispatch,
    gpu,
    pack,
    reference,
)
from kernels.balanced.gpu import arms, measure, table
from kernels.balanced.gpu.table import GpuRegime, GpuTable
from tests.kernels.balanced.world import randn

HALF = torch.float16


def regime(density: float, size: float, *, captured: bool = True, vector: int = 1) -> GpuRegime:
    return GpuRegime("fp16", "fp16", 32, vector, density, size, captured)


MEASURED = GpuTable(
    (
        (regime(0.25, 24), ((1, "gather"), (16, "decompress"), (64, "dense"))),
        (regime(0.25, 26), ((1, "gather"), (16, "decompress"), (64, "decompress"))),
        (regime(0.5, 24), ((1, "gather"), (16, "dense"), (64, "dense"))),
    ),
    "by hand",
)


@pytest.mark.parametrize(
    ("density", "size", "batch", "arm"),
    [
        (0.25, 24, 1, "gather"),
        (0.25, 24, 16, "decompress"),
        (0.25, 24, 64, "dense"),
        (0.25, 26, 40, "decompress"),  # both neighbours agree
        (0.25, 24, 4, "dense"),  # they do not
        (0.25, 25, 16, "decompress"),  # both sizes agree
        (0.25, 25, 64, "dense"),
        (0.25, 30, 4096, "decompress"),  # beyond the largest: what that says
        (0.1, 26, 1, "gather"),
        (0.4, 24, 16, "dense"),  # the next denser one
        (0.9, 24, 1, "dense"),  # denser than anything measured
    ],
)
def test_between_measurements_dense_is_taken_unless_all_agree(density, size, batch, arm):
    assert MEASURED.lookup(regime(density, size), batch) == arm


def test_another_kernel_or_mode_was_not_measured():
    assert MEASURED.lookup(regime(0.25, 24, captured=False), 1) is None
    assert MEASURED.lookup(regime(0.25, 24, vector=32), 1) is None


def spec(k=8, block=32, value_type="fp16", vector=1, rows=8192, columns=8192):
    return BalancedSpec(rows, columns, k, block, value_type, vector=vector)


def test_defaults_follow_the_bytes_and_the_products():
    assert table.default(spec(), HALF, 1, True) == "gather"
    assert table.default(spec(24), HALF, 1, True) == "dense"  # more bytes than dense
    assert table.default(spec(rows=512, columns=512), HALF, 1, True) == "dense"  # a launch costs more
    assert table.default(spec(rows=4096, columns=4096), HALF, 1, False) == "dense"  # and Python more than that
    assert table.default(spec(4), HALF, 16, True) == "decompress"
    assert table.default(spec(4), HALF, 1024, True) == "dense"
    assert table.default(spec(vector=64), HALF, 1024, True) == "vector"
    assert table.default(spec(16, vector=64), HALF, 1024, True) == "dense"


def test_only_arms_that_can_compute_a_product_are_offered():
    assert arms.fitting(spec(), HALF, 1) == ["dense", "gather", "decompress"]
    assert arms.fitting(spec(), HALF, 17) == ["dense", "decompress"]
    assert arms.fitting(spec(vector=32), HALF, 17) == ["dense", "decompress", "vector"]
    assert arms.fitting(spec(), torch.float64, 1) == ["dense"]
    assert "2:4" in arms.fitting(spec(2, 4), HALF, 512)
    assert "2:4" not in arms.fitting(spec(2, 4), torch.bfloat16, 512)  # of other values
    assert "2:4" not in arms.fitting(spec(2, 4, rows=8190), HALF, 512)
    assert arms.fitting(spec(2, 4, "int8"), HALF, 512) == ["dense", "decompress"]


def test_two_of_four_is_not_offered_where_torch_has_no_kernel_or_a_wrong_one(monkeypatch, caplog):
    cpu = torch.device("cpu")  # torch has none for it
    arms.two_of_four_works.cache_clear()
    with caplog.at_level(logging.WARNING, logger="sextant.kernels"):
        assert "2:4" not in arms.working(spec(2, 4), HALF, 512, cpu)
    assert "do not run" in caplog.text
    for factor, offered in ((1.0, True), (1.5, False)):
        arms.two_of_four_works.cache_clear()
        monkeypatch.setattr(
            arms, "product", lambda arm, x, weight, bias, by=factor: reference.linear(x, weight, bias).to(x.dtype) * by
        )
        assert ("2:4" in arms.working(spec(2, 4), HALF, 512, cpu)) == offered
    arms.two_of_four_works.cache_clear()


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """An empty folder for the table of a GPU that is none."""
    path = tmp_path / "balanced" / "gpu.json"
    monkeypatch.setattr(table, "table_path", lambda device: path)
    table.reset()
    yield path
    monkeypatch.undo()
    table.reset()


def test_a_table_is_kept_and_used(kept):
    device = torch.device("cuda", 0)
    packed = spec()
    measured = GpuTable(((table.regime_of(packed, HALF, True), ((1, "dense"), (8, "gather"))),), "by hand")
    assert table.choose(packed, device, HALF, 1, True) == "gather"  # the default
    table.save(measured, kept)
    table.reset()
    assert table.table(device) == measured
    assert table.choose(packed, device, HALF, 1, True) == "dense"
    assert table.choose(packed, device, HALF, 8, True) == "gather"
    assert table.choose(packed, device, HALF, 32, True) == "dense"  # gather takes no such batch


ROW = {"x": "fp16", "value_type": "fp16", "block": 32, "vector": 1, "density": 0.25, "size": 24, "captured": True}
BROKEN = (
    "",
    "[]",
    json.dumps({"version": 99, "rows": [], "source": ""}),
    json.dumps({"version": table.VERSION, "source": "x", "rows": [{**ROW, "arms": []}]}),
    json.dumps({"version": table.VERSION, "source": "x", "rows": [{**ROW, "arms": [[1, "magic"]]}]}),
    json.dumps({"version": table.VERSION, "source": "x", "rows": [{**ROW, "arms": [[8, "dense"], [1, "dense"]]}]}),
    json.dumps({"version": table.VERSION, "source": "x", "rows": [{**ROW, "density": 2, "arms": [[1, "dense"]]}]}),
    json.dumps({"version": table.VERSION, "source": "x", "rows": [{**ROW, "more": 1, "arms": [[1, "dense"]]}]}),
)


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_table_is_said_and_not_used(kept, text, caplog):
    kept.parent.mkdir(parents=True)
    kept.write_text(text)
    with pytest.raises(BalancedFormatError):
        table.read(kept)
    with caplog.at_level(logging.WARNING, logger="sextant.kernels"):
        assert table.table(torch.device("cuda", 0)).source == "defaults"
    assert "defaults apply" in caplog.text


def test_dense_stays_unless_another_arm_beats_it_by_the_margin():
    assert measure.choose({"dense": 10.0, "gather": 5.0, "decompress": 7.0}) == "gather"
    assert measure.choose({"dense": 10.0, "gather": 9.9}) == "dense"
    assert measure.choose({"dense": 10.0}) == "dense"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_measuring_without_a_gpu_is_a_clear_error(capsys):
    assert __main__.main(["--device", "cuda"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    with pytest.raises(BalancedFormatError, match="GPU"):
        measure.measure(torch.device("cpu"))


def test_a_device_that_is_none_is_a_clear_error(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["--device", "toaster"])
    assert "toaster is no device" in capsys.readouterr().err


def test_without_triton_a_gpu_computes_densely_and_says_so_once(monkeypatch, caplog):
    monkeypatch.delattr(gpu, "launch", raising=False)  # another test may have imported it
    monkeypatch.setitem(sys.modules, "kernels.balanced.gpu.launch", None)
    arms.has_triton.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="sextant.kernels"):
            assert not arms.takes(torch.device("cuda", 0), HALF)
            assert not arms.takes(torch.device("cuda", 0), HALF)
        assert caplog.text.count("Triton is missing") == 1
    finally:
        arms.has_triton.cache_clear()


def test_on_the_cpu_nothing_of_this_is_asked(monkeypatch):
    monkeypatch.setattr(table, "choose", None)
    packed, x = pack(randn(33, 40), 3, 8, layout="warps"), randn(2, 40)
    assert dispatch.choose(packed, 2, torch.float32) in ("sparse", "dense")
    assert torch.allclose(balanced_linear(x, packed).double(), reference.linear(x, packed), atol=1e-5)
