"""ResNet-18/34/50/101 (He et al. 2015, table 1) with the stride in the 3x3 convolution of a bottleneck, as torchvision has it.

Shapes: B batch, C channels, H = W picture.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apps.migperf.workloads.shapes import Shape

EXPANSION = 4


class Block(nn.Module):
    """A residual block: 3x3, 3x3; or, as a bottleneck, 1x1, 3x3, 1x1 with four times the channels at its end."""

    def __init__(self, channels_in: int, channels: int, stride: int, bottleneck: bool):
        super().__init__()
        out = channels * (EXPANSION if bottleneck else 1)
        if bottleneck:
            layers = [_conv(channels_in, channels, 1), nn.ReLU(inplace=True), _conv(channels, channels, 3, stride),
                      nn.ReLU(inplace=True), _conv(channels, out, 1)]  # fmt: skip
        else:
            layers = [_conv(channels_in, channels, 3, stride), nn.ReLU(inplace=True), _conv(channels, channels, 3)]
        self.body = nn.Sequential(*layers)
        same = stride == 1 and channels_in == out
        self.shortcut = nn.Identity() if same else _conv(channels_in, out, 1, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.relu(self.body(x_BCHW) + self.shortcut(x_BCHW))


class ResNet(nn.Module):
    """Pictures [B, 3, H, H] to logits [B, classes]."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, shape.width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(shape.width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        blocks, channels_in = [], shape.width
        for stage, depth in enumerate(shape.depth):
            channels = shape.width * 2**stage
            for number in range(depth):
                stride = 2 if stage and not number else 1
                blocks.append(Block(channels_in, channels, stride, shape.bottleneck))
                channels_in = channels * (EXPANSION if shape.bottleneck else 1)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels_in, shape.classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x_BCHW)).mean((2, 3)))


def _conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(channels_out)
    )
