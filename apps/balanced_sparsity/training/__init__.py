"""Training and pruning: tasks (what a step and a score are), the one loop, and where it runs (here, Ray Train under C4, Tune)."""
