"""Programs that people run: one folder a system, each started as ``python -m apps.<system> VERB``."""
