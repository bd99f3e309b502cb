"""The paged-KV serving engine of one instance. Imports and runs without Ray."""
