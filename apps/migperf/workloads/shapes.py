"""The catalogue of workloads: names, and the shapes that they are built from. Plain data; no torch, nothing downloaded.

``scaled`` shrinks a shape for a CPU: depth, width and picture by the factor, never what makes the family (bottlenecks stay
bottlenecks, decoding stays decoding).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from apps.program.errors import UserError

Family = Literal["resnet", "vit", "encoder", "lstm", "decoder"]


@dataclass(frozen=True)
class Shape:
    """One workload. Fields that a family does not have are 0."""

    name: str
    family: Family
    depth: tuple[int, ...]
    """Blocks a stage (resnet), else one number: layers."""
    width: int
    """Channels of the first stage (resnet), else the hidden size."""
    heads: int = 0
    kv_heads: int = 0
    feed_forward: int = 0
    vocabulary: int = 0
    bottleneck: bool = False
    picture: int = 0
    patch: int = 0
    classes: int = 1000

    @property
    def has_sequence(self) -> bool:
        """Whether a trial's sequence length means something to it."""
        return self.family in ("encoder", "lstm", "decoder")


def _encoder(name: str, layers: int, hidden: int, heads: int, feed_forward: int, vocabulary: int) -> Shape:
    return Shape(name, "encoder", (layers,), hidden, heads, heads, feed_forward, vocabulary, classes=2)


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("resnet18", "resnet", (2, 2, 2, 2), 64, picture=224),
        Shape("resnet34", "resnet", (3, 4, 6, 3), 64, picture=224),
        Shape("resnet50", "resnet", (3, 4, 6, 3), 64, picture=224, bottleneck=True),
        Shape("resnet101", "resnet", (3, 4, 23, 3), 64, picture=224, bottleneck=True),
        Shape("vit_base", "vit", (12,), 768, 12, 12, 3072, picture=224, patch=16),
        _encoder("bert_base", 12, 768, 12, 3072, 30522),
        _encoder("bert_large", 24, 1024, 16, 4096, 30522),
        _encoder("distilbert", 6, 768, 12, 3072, 30522),
        _encoder("minilm", 6, 384, 12, 1536, 30522),
        Shape("lstm", "lstm", (2,), 1024, vocabulary=10000, classes=0),
        Shape("llama_decode", "decoder", (16,), 2048, 32, 8, 8192, 128256),
    )
}


def shape(name: str, scale: float = 1.0) -> Shape:
    """The shape of a workload, shrunk by ``scale`` (1: as published).

    Raises:
        UserError: unknown name or a scale out of (0, 1].
    """
    if name not in SHAPES:
        raise UserError(f"There is no workload {name!r}: there are {', '.join(SHAPES)}.")
    if not 0 < scale <= 1:
        raise UserError(f"The scale of a workload must be above 0 and at most 1, not {scale}.")
    return SHAPES[name] if scale == 1 else scaled(SHAPES[name], scale)


def scaled(known: Shape, scale: float) -> Shape:
    """Depth by the scale (at least one block), width by the scale in multiples of a head, pictures in multiples of a patch."""
    depth = tuple(max(1, round(blocks * scale)) for blocks in known.depth)
    if known.family == "resnet":
        return replace(
            known,
            depth=depth,
            width=max(4, round(known.width * scale / 4) * 4),
            picture=max(32, round(known.picture * scale / 32) * 32),
            classes=max(10, round(known.classes * scale)),
        )
    vocabulary = max(100, round(known.vocabulary * scale)) if known.vocabulary else 0
    if known.family == "lstm":
        return replace(known, depth=depth, width=max(16, round(known.width * scale / 8) * 8), vocabulary=vocabulary)
    head = known.width // known.heads
    groups = known.heads // known.kv_heads
    heads = max(groups, round(known.heads * scale / groups) * groups)
    return replace(
        known,
        depth=depth,
        width=heads * head,
        heads=heads,
        kv_heads=heads // groups,
        feed_forward=heads * head * known.feed_forward // known.width,
        vocabulary=vocabulary,
        picture=max(2 * known.patch, round(known.picture * scale / known.patch) * known.patch) if known.patch else 0,
        classes=max(2, round(known.classes * scale)) if known.classes else 0,
    )
