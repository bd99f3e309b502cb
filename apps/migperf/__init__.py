"""MIGPerf: benchmark, predict and plan slices of GPUs, with MIG and without."""
