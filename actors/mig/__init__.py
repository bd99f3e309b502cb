"""GPU slices: their geometry, their control, and what a workload does on them."""
