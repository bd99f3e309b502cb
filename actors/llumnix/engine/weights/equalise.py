"""Makes a model easier to quantise to int8 without changing what it computes: moves the norms' outlier channels into weights.

An int8 activation row has one scale, so a channel that is large in every row costs all others their precision. RMSNorm's own
weight g tells which channels those are: dividing g by s and multiplying the columns of the matrices behind it by s computes
the same. s balances both sides as SmoothQuant does (Xiao et al. 2023, eq. 4), with g in the place of measured activations,
so that nothing is calibrated and every instance gets the same bits. s is a power of two: no rounding in fp32.
"""

from __future__ import annotations

import torch

from actors.llumnix.engine.weights.source import WeightSource

STRENGTH = 0.8
"""Share of the outliers that moves into the weights (SmoothQuant's alpha)."""
# Only before the attention: behind the other norm, without measured activations, it gained nothing on SmolLM2.
_BEHIND = {"attn_norm": ("q", "k", "v")}
_NORM_OF = {name: norm for norm, names in _BEHIND.items() for name in names}


class EqualisedSource:
    """A ``WeightSource`` whose int8 version is nearer to the original; its fp32 version computes the same bits."""

    def __init__(self, source: WeightSource):
        self._source = source
        self.path = source.path
        self.config = source.config
        self.fingerprint = source.fingerprint
        self._scales: dict[tuple[str, str], torch.Tensor] = {}

    def _scale(self, layer: str, norm: str) -> torch.Tensor:
        """s of a norm's channels: (|g|^a / max|W column|^(1-a)), rounded to a power of two. fp32 [hidden]"""
        key = (layer, norm)
        if key not in self._scales:
            gain = self._source.tensor(f"layers.{layer}.{norm}").double().abs()
            columns = [self._source.tensor(f"layers.{layer}.{name}").abs().amax(dim=0) for name in _BEHIND[norm]]
            largest = torch.stack(columns).double().amax(dim=0)
            scale = torch.exp2((STRENGTH * gain.log2() - (1 - STRENGTH) * largest.log2()).round())
            usable = (gain > 0) & (largest > 0) & scale.isfinite()
            self._scales[key] = torch.where(usable, scale, 1.0).clamp(2.0**-24, 2.0**24).float()
        return self._scales[key]

    def tensor(self, name: str) -> torch.Tensor:
        """See ``WeightSource``."""
        weight = self._source.tensor(name)
        _, _, rest = name.partition("layers.")
        layer, _, part = rest.partition(".")
        if part in _BEHIND:
            return weight.float() / self._scale(layer, part)
        if part in _NORM_OF:
            return weight.float() * self._scale(layer, _NORM_OF[part])
        return weight
