"""Sweeps: trials as data, the process that measures one, the choice of the next, and Ray Tune around them."""
