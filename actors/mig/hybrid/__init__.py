"""Hybrid orchestration: training and serving share a device whose partition follows the load. Pure of Ray and of torch."""
