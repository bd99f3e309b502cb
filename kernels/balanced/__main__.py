"""``python -m kernels.balanced [--quick] [--threads N] [--device cuda]``: measure the dispatcher's table and keep it."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from kernels.balanced import calibrate, dispatch
from kernels.balanced.spec import BalancedFormatError


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 where nothing can be measured."""
    parser = argparse.ArgumentParser(prog="python -m kernels.balanced", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and value types")
    parser.add_argument("--threads", type=int, help="measure with so many threads (torch's own number by default)")
    parser.add_argument("--device", default="cpu", help="cpu (default), or a CUDA device such as cuda or cuda:1")
    options = parser.parse_args(arguments)
    try:
        device = torch.device(options.device)
    except RuntimeError:
        parser.error(f"--device {options.device} is no device; it is cpu, cuda or cuda:N")
    if device.type != "cpu":
        return measure_gpu(device, options.quick)
    if options.threads is not None:
        if options.threads < 1:
            parser.error("--threads must be at least 1")
        torch.set_num_threads(options.threads)
    began = time.monotonic()

    def show(step: calibrate.Progress) -> None:
        regime = step.regime
        batch = "never" if step.dense_from >= dispatch.ALWAYS else f"from batch {step.dense_from} on"
        print(
            f"[{time.monotonic() - began:5.1f} s] {step.number}/{step.of} {regime.value_type} x {regime.x}, {regime.index}, "
            f"density {regime.density:.3g}, {2**regime.size:.3g} entries: dense {batch}",
            flush=True,
        )

    try:
        table = calibrate.calibrate(options.quick, show)
        path = dispatch.table_path()
        dispatch.save(table, path)
    except (BalancedFormatError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(table.dense_from)} regimes in {path}")
    return 0


def measure_gpu(device: torch.device, quick: bool) -> int:
    """The table of a GPU; 0, or 2 where nothing can be measured."""
    from kernels.balanced.gpu import measure, table

    began = time.monotonic()

    def show(step: measure.Progress) -> None:
        regime = step.regime
        arms = ", ".join(f"{batch}: {arm}" for batch, arm in step.arms)
        print(
            f"[{time.monotonic() - began:6.1f} s] {step.number}/{step.of} {regime.value_type} x {regime.x}, B {regime.block}, "
            f"V {regime.vector}, density {regime.density:.3g}, {2**regime.size:.3g} entries, "
            f"{'in a graph' if regime.captured else 'eager'}: {arms}",
            flush=True,
        )

    if device.type != "cuda" or not torch.cuda.is_available():
        print(f"error: there is no CUDA GPU here to measure ({device})", file=sys.stderr)
        return 2
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    try:
        found = measure.measure(device, quick, show)
        path = table.table_path(device)
        table.save(found, path)
    except (BalancedFormatError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(found.arms)} regimes in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
