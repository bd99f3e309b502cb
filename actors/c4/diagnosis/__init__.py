"""What decides: pure functions from observations of all ranks to verdicts. No Ray, no torch."""
