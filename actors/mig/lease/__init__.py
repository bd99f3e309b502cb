"""Slices as Ray custom resources, and the lease of one slice to one worker. ``names`` and ``table`` are pure of Ray."""
