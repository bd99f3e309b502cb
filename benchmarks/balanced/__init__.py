"""Helpers of the balanced-sparsity benchmarks."""
