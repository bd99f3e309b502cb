"""Target distributions over a row's keys, and divergences of attention from them. E rows, G heads, S keys; nats."""

from __future__ import annotations

from typing import Literal

import torch

from apps.mcmisp.guidance.config import GuidanceConfig


def target_log_weights(badness_ES: torch.Tensor, kept_ES: torch.Tensor, config: GuidanceConfig) -> torch.Tensor:
    """log g [E, S], -inf outside of ``kept_ES`` (and in rows with nothing kept): the higher the badness, the lower the weight."""
    if config.shape == "softmax":
        logits = (-badness_ES / config.temperature).masked_fill(~kept_ES, -1e30)
        return torch.log_softmax(logits, -1).masked_fill(~kept_ES, float("-inf"))
    inf = float("inf")
    highest = badness_ES.masked_fill(~kept_ES, -inf).max(-1, keepdim=True).values
    if config.shape == "linear":
        lowest = badness_ES.masked_fill(~kept_ES, inf).min(-1, keepdim=True).values
        span = highest - lowest
        # 1 - c with c scaled to 0..1 in the row; where all keys are alike, all weigh the same.
        weight = torch.where(span > 0, (highest - badness_ES) / span.clamp(min=1e-12), 1.0)
    else:
        ordered = badness_ES.masked_fill(~kept_ES, inf).sort(-1).values
        middle = ((kept_ES.sum(-1, keepdim=True) - 1) // 2).clamp(min=0)
        weight = (badness_ES <= ordered.gather(-1, middle)).float()
    weight = torch.where(kept_ES, weight, 0.0)
    total = weight.sum(-1, keepdim=True)
    return torch.where(total > 0, weight / total.clamp(min=1e-30), 0.0).log()


def divergence(
    kind: Literal["kl", "mse", "bce"], log_g_ES: torch.Tensor, log_a_EGS: torch.Tensor, kept_ES: torch.Tensor
) -> torch.Tensor:
    """D(g || A) [E, G] over the kept keys; 0 for rows without any.

    kl: sum of g (log g - log A). mse: sum of (g - A)^2. bce: mean of -(g log A + (1 - g) log(1 - A)).
    """
    kept = kept_ES[:, None]
    used = kept & torch.isfinite(log_g_ES)[:, None]
    g = torch.where(used, log_g_ES[:, None].exp(), 0.0)
    log_a = torch.where(kept, log_a_EGS, 0.0)
    if kind == "kl":
        return (g * (torch.where(used, log_g_ES[:, None], 0.0) - log_a)).sum(-1)
    a = torch.where(kept, log_a.exp(), 0.0)
    if kind == "mse":
        return (g - a).square().sum(-1)
    cross = -(g * log_a + (1 - g) * torch.log1p(-a.clamp(max=1 - 1e-6)))
    return torch.where(kept, cross, 0.0).sum(-1) / kept.sum(-1).clamp(min=1)


__all__ = ["divergence", "target_log_weights"]
