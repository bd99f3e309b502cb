"""The GPU benchmark without a GPU: one line that says so, no figures, no failure, no Ray."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.migperf_gpu import main, no_gpu, tail_ratio


@pytest.mark.skipif(no_gpu() is None, reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys) -> None:
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    assert "nothing measured" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_it_needs_no_ray() -> None:
    code = "import sys, benchmarks.migperf_gpu; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_neighbour_that_fails_is_told() -> None:
    def fail() -> float:
        raise RuntimeError("the device is lost")

    with pytest.raises(RuntimeError, match="the device is lost"):
        tail_ratio(lambda: 1.0, fail, 0.001)
    assert tail_ratio(lambda: 1.0, lambda: 1.0, 0.001) == 1.0


@pytest.mark.gpu
def test_a_green_slice_computes_what_the_whole_gpu_does() -> None:
    import torch

    from actors.mig.backends.green_driver import GreenDriver, GreenPartition

    given = torch.randn(512, 512, device="cuda")
    with GreenPartition(GreenDriver(0), [16]) as partition:
        assert partition.sm_counts[0] >= 16
        stream = torch.cuda.ExternalStream(partition.streams[0])
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            product = given @ given
        stream.synchronize()
    torch.testing.assert_close(product, given @ given)
