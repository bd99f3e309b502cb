"""Sampling as batched torch operations: the GPU path, and the CPU path where no compiler exists.

Nothing is read back from the device: which steps a batch needs is decided from its parameters, which live on the CPU.
"""

from __future__ import annotations

import torch

from kernels.sampling.batch import INTEGER_FIELDS, REAL_FIELDS, SamplingBatch, SamplingResult
from kernels.sampling.philox import uniform_torch
from kernels.sampling.reference import GREEDY_TEMPERATURE


def sample(logits_RV: torch.Tensor, batch: SamplingBatch) -> SamplingResult:
    """See kernels.sampling.sample; any float dtype and device, results on that device."""
    device = logits_RV.device
    rows, vocab = logits_RV.shape
    raw = logits_RV.float()
    real = dict(zip(REAL_FIELDS, batch.real.to(device, non_blocking=True).unbind(1), strict=True))
    integer = dict(zip(INTEGER_FIELDS, batch.integer.to(device, non_blocking=True).unbind(1), strict=True))
    logprobs, top_ids, top_logprobs = _report(raw, integer["num_logprobs"], batch)
    x = _adjust(raw, batch, real)
    # What the parameters say on the CPU decides which steps run.
    temperature = batch.real[:, REAL_FIELDS.index("temperature")]
    greedy = temperature < GREEDY_TEMPERATURE
    best = x.argmax(1)
    invalid = ~(raw < float("inf")).all(1) | (x.max(1).values == float("-inf"))
    if bool(greedy.all()):
        tokens = best
    else:
        draw = _draw(x, batch, real, integer, best)
        tokens = torch.where(real["temperature"] < GREEDY_TEMPERATURE, best, draw)
    tokens = tokens.masked_fill(invalid, -1)
    return SamplingResult(tokens, _at(logprobs, tokens, integer["num_logprobs"]), top_ids, top_logprobs)


def _report(
    raw: torch.Tensor, wanted: torch.Tensor, batch: SamplingBatch
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    rows, vocab = raw.shape
    column = batch.integer[:, INTEGER_FIELDS.index("num_logprobs")]
    most = min(vocab, max(-1, int(column.max()) if rows else -1))
    logprobs = raw.log_softmax(1) if most >= 0 else None
    n = max(0, most)
    if logprobs is None or n == 0:
        return logprobs, raw.new_full((rows, n), -1, dtype=torch.int64), raw.new_full((rows, n), float("nan"))
    ids = raw.sort(dim=1, descending=True, stable=True).indices[:, :n]  # stable: equal logits by ascending id
    beyond = torch.arange(n, device=raw.device) >= wanted[:, None]
    return logprobs, ids.masked_fill(beyond, -1), logprobs.gather(1, ids).masked_fill(beyond, float("nan"))


def _at(logprobs: torch.Tensor | None, tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    if logprobs is None:
        return torch.full(tokens.shape, float("nan"), device=tokens.device)
    chosen = logprobs.gather(1, tokens.clamp(min=0)[:, None])[:, 0]
    return chosen.masked_fill((wanted < 0) | (tokens < 0), float("nan"))


def _adjust(raw: torch.Tensor, batch: SamplingBatch, real: dict[str, torch.Tensor]) -> torch.Tensor:
    """Bias, bans and penalties; a copy only if there are any."""
    if batch.bias_ids.numel() == 0 and batch.penalty_ids.numel() == 0:
        return raw
    x = raw.clone()
    device = raw.device
    if batch.bias_ids.numel() > 0:
        row = _rows(batch.bias_start, batch.bias_ids).to(device, non_blocking=True)
        ids = batch.bias_ids.to(device, non_blocking=True)
        x[row, ids] += batch.bias_values.to(device, non_blocking=True)
    if batch.penalty_ids.numel() > 0:
        row = _rows(batch.penalty_start, batch.penalty_ids).to(device, non_blocking=True)
        ids = batch.penalty_ids.to(device, non_blocking=True)
        counts = batch.penalty_counts.to(device, non_blocking=True)
        value = x[row, ids].double()
        repetition = real["repetition_penalty"][row]
        value = torch.where(value > 0, value / repetition, value * repetition)
        additive = real["frequency_penalty"][row] * counts + real["presence_penalty"][row]
        x[row, ids] = (value - torch.where(counts > 0, additive, 0.0)).float()
    return x


def _rows(start: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Row of each id, from the rows' starts; on the CPU."""
    return torch.repeat_interleave(torch.arange(len(start) - 1), start.diff(), output_size=ids.numel())


def _draw(
    x: torch.Tensor,
    batch: SamplingBatch,
    real: dict[str, torch.Tensor],
    integer: dict[str, torch.Tensor],
    best: torch.Tensor,
) -> torch.Tensor:
    rows, vocab = x.shape
    peak = x.gather(1, best[:, None])
    temperature = real["temperature"].clamp(min=GREEDY_TEMPERATURE)[:, None]
    weight = torch.exp((x - peak).double() / temperature)
    weight = torch.where(weight >= real["min_p"][:, None], weight, 0.0)
    top_k, top_p = batch.integer[:, INTEGER_FIELDS.index("top_k")], batch.real[:, REAL_FIELDS.index("top_p")]
    if bool((top_k > 0).any()) or bool((top_p < 1).any()):
        order = x.sort(dim=1, descending=True, stable=True).indices
        ranked = weight.gather(1, order)
        k = torch.where(integer["top_k"] > 0, integer["top_k"], vocab)[:, None]
        ranked = torch.where(torch.arange(vocab, device=x.device) < k, ranked, 0.0)
        wanted = real["top_p"][:, None] * ranked.sum(1, keepdim=True)
        reached = (ranked.cumsum(1) - ranked >= wanted) & (real["top_p"] < 1)[:, None]  # by the tokens before it
        ranked = torch.where(reached, 0.0, ranked)
        weight = torch.zeros_like(weight).scatter_(1, order, ranked)
    cumulative = weight.cumsum(1)
    target = uniform_torch(integer["seed"], integer["position"])[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True)[:, 0]
    last = vocab - 1 - (weight.flip(1) > 0).int().argmax(1)
    return torch.minimum(chosen, last)
