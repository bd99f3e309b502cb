"""``python -m kernels.balanced [--quick] [--threads N]``: measure the dispatcher's table of this machine and keep it."""

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
    options = parser.parse_args(arguments)
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


if __name__ == "__main__":
    sys.exit(main())
