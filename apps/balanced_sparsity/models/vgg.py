"""VGG-style convolutional networks (Simonyan & Zisserman, ICLR 2015), for images of 8 x 8 pixels up to ImageNet's 224 x 224."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Configuration D of the paper: 13 convolutions."""


class Vgg(nn.Module):
    """Stages of 3 x 3 convolutions, each ended by a 2 x 2 max pool; then the classifier.

    Args:
        stages: output channels of each convolution, by stage.
        channels: of the image.
        classes: outputs.
        hidden: widths of the classifier's hidden layers (VGG-16: 4096, 4096); none: one linear layer.
        pooled: side that the last map is averaged to before the classifier (VGG-16: 7).
        dropout: before each linear layer that follows a hidden one (VGG-16: 0.5).
        batch_norm: after each convolution (Ioffe & Szegedy, 2015; not in the paper).
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        channels: int,
        classes: int,
        *,
        hidden: Sequence[int] = (),
        pooled: int = 1,
        dropout: float = 0.0,
        batch_norm: bool = True,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        width = channels
        for stage in stages:
            for out in stage:
                layers.append(nn.Conv2d(width, out, 3, padding=1, bias=not batch_norm))
                layers += [nn.BatchNorm2d(out)] if batch_norm else []
                layers.append(nn.ReLU(inplace=True))
                width = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(pooled)
        classifier: list[nn.Module] = []
        width *= pooled * pooled
        for out in hidden:
            classifier += [nn.Linear(width, out), nn.ReLU(inplace=True), nn.Dropout(dropout)]
            width = out
        classifier.append(nn.Linear(width, classes))
        self.classifier = nn.Sequential(*classifier)
        self._initialise()

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes]."""
        return self.classifier(self.pool(self.features(x_BCHW)).flatten(1))

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01 if module.in_features > 1024 else module.in_features**-0.5)
                nn.init.zeros_(module.bias)
