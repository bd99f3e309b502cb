"""Helpers of the migperf benchmarks."""
