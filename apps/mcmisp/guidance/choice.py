"""Which heads of which layers are guided."""

from __future__ import annotations

from apps.mcmisp.guidance.config import GuidanceConfig
from apps.program.errors import UserError


def guided_heads(config: GuidanceConfig, layers: int, heads: int) -> dict[int, tuple[int, ...]]:
    """Layer -> guided heads, the first ones of each chosen layer.

    Raises:
        UserError: a layer or that many heads do not exist.
    """
    count = config.heads or max(1, heads // 4)
    if count > heads:
        raise UserError(f"guidance.heads={count}, but a layer has {heads} heads.")
    return {layer: tuple(range(count)) for layer in _layers(config, layers)}


def _layers(config: GuidanceConfig, layers: int) -> list[int]:
    chosen = config.layers
    if not isinstance(chosen, str):
        beyond = [layer for layer in chosen if not 0 <= layer < layers]
        if beyond or not chosen:
            raise UserError(f"guidance.layers={list(chosen)}, but the encoder's layers are 0 to {layers - 1}.")
        return sorted(set(chosen))
    half, quarter = layers // 2, layers // 4
    ranges = {
        "all": range(layers), "lower": range(max(1, half)), "upper": range(half, layers),
        "middle": range(quarter, max(quarter + 1, layers - quarter)),
    }  # fmt: skip
    return list(ranges[chosen])


__all__ = ["guided_heads"]
