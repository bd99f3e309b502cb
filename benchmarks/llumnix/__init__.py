"""What the llumnix benchmarks share: instances without Serve, and requests that use everything a migration carries."""
