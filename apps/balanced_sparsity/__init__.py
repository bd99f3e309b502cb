"""Balanced sparsity as an app: models are trained, pruned to k non-zeros in every block, compared, exported and served."""
