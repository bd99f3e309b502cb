"""Recovery: what to do about a verdict (policy), checkpoints in the memory of two nodes and on disk, which step is whole."""
