"""Pruning in plain torch, without Ray: patterns and masks, the gradual sparsifier, one-shot scores, packing."""
