"""Sampling on a GPU (skipped without one): the choices of the float64 definition, and no wait for the device."""

from __future__ import annotations

import pytest
import torch

from kernels.sampling import SamplingBatch, SamplingRow, TokenCounts, reference, sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def test_equals_the_definition_without_a_sync():
    variants = [{"temperature": 0.0}, {}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02}, {"repetition_penalty": 1.3}]
    counts = TokenCounts([1, 2, 3], [3, 4])
    rows = [
        SamplingRow(**variant, counts=counts, banned_ids=[5], seed=seed, position=seed, num_logprobs=3)
        for variant in variants
        for seed in range(5)
    ]
    logits = 3 * torch.randn(len(rows), 49_152, generator=torch.Generator().manual_seed(0))
    on_gpu, batch = logits.cuda(), SamplingBatch.from_rows(rows)
    sample(on_gpu, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = sample(on_gpu, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.token_ids.is_cuda
    for i, row in enumerate(rows):
        assert result.token_ids[i].item() == reference.sample_row(logits[i].numpy(), row)
        assert result.top_ids[i].tolist() == reference.top(logits[i].numpy(), 3).tolist()
