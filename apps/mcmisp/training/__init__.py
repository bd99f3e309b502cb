"""Pre-training: optimizers and schedules, objectives with guidance, the loop in one process or under Ray Train."""
