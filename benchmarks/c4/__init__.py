"""What the benchmarks of C4 share."""
