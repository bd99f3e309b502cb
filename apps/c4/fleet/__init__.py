"""A simulated training job of thousands of ranks with injected faults, whose observations feed the real master and diagnosis."""
