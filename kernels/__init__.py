"""Tensor code: one folder an operation, each with a reference, a CPU path, a GPU path and one entry point. Never imports Ray."""
