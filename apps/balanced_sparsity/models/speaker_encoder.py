"""A really trained net to prune: the speech LSTM of the package resemblyzer, which tells voices apart (GE2E, Wan et al., 2018).

Only its weights file is read; the package is not imported and need not have its own dependencies.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from apps.program.errors import UserError
from apps.training.checkpoint import load_tensors

WINDOW_FRAMES = 160
"""Frames (10 ms) that the encoder was trained on and hears at a time."""
HOW = "Install it with: pip install --no-deps resemblyzer==0.1.4 (its weights alone are read)."


class SpeakerEncoder(nn.Module):
    """Three LSTM layers over 40 mel channels; the last layer's last output, projected, is the voice's direction.

    Each layer is a module of its own, so that what each hears can be compared with the dense network's. ``scale`` [features]:
    what each channel is divided by first. Powers of mel channels differ a thousandfold; with the deviations in ``scale`` and the
    first layer's weights multiplied by them (``rescale_``) the network computes the same, and its weights can be compared.
    """

    scale: torch.Tensor

    def __init__(self, features: int = 40, hidden: int = 256, layers: int = 3, embedding: int = 256):
        super().__init__()
        self.register_buffer("scale", torch.ones(features))
        self.layers = nn.ModuleList(
            nn.LSTM(hidden if number else features, hidden, batch_first=True) for number in range(layers)
        )
        self.linear = nn.Linear(hidden, embedding)

    def forward(self, frames_BTF: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(each layer's outputs [B, T, H], unit vectors [B, E])."""
        heard: list[torch.Tensor] = []
        inputs = frames_BTF / self.scale
        for layer in self.layers:
            inputs, _ = layer(inputs)
            heard.append(inputs)
        return heard, F.normalize(F.relu(self.linear(inputs[:, -1])), dim=1)

    @torch.no_grad()
    def rescale_(self, scale: torch.Tensor) -> None:
        """Divide the channels by ``scale`` [features] (above 0) instead; the outputs stay what they are."""
        self.layers[0].weight_ih_l0.mul_(scale / self.scale)  # type: ignore[operator]
        self.scale.copy_(scale)


def trained_speaker_encoder(path: str | None = None) -> SpeakerEncoder:
    """The encoder with its published weights: from ``path``, or from the installed package resemblyzer.

    Raises:
        UserError: they are not there, or are something else.
    """
    if path is None:
        spec = importlib.util.find_spec("resemblyzer")  # found, never imported
        if spec is None or spec.origin is None:
            raise UserError(f"The trained speaker encoder is in the package resemblyzer, which is not installed. {HOW}")
        path = str(Path(spec.origin).parent / "pretrained.pt")
    content = load_tensors(Path(path).expanduser())
    model = SpeakerEncoder()
    try:
        weights = content["model_state"]
        names = {
            f"layers.{layer}.{part}_l0": f"lstm.{part}_l{layer}"
            for layer in range(len(model.layers))
            for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        names |= {name: name for name in ("linear.weight", "linear.bias")}
        model.load_state_dict({own: weights[theirs] for own, theirs in names.items()} | {"scale": model.scale})
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} does not hold the weights of resemblyzer's encoder. {HOW}") from error
    return model


def windows_of(frames: torch.Tensor) -> torch.Tensor:
    """Windows [N, WINDOW_FRAMES, channels] of a spectrogram [frames, channels], half overlapping; a short one is zero-padded.

    The last window is left out when it is filled by less than three quarters.
    """
    step = WINDOW_FRAMES // 2
    starts = list(range(0, max(1, len(frames) - step), step))
    if len(starts) > 1 and len(frames) - starts[-1] < 0.75 * WINDOW_FRAMES:
        starts.pop()
    padded = F.pad(frames, (0, 0, 0, max(0, starts[-1] + WINDOW_FRAMES - len(frames))))
    return torch.stack([padded[first : first + WINDOW_FRAMES] for first in starts])


@torch.no_grad()
def voice_of(model: nn.Module, spectrograms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Unit vectors [N, E]: of each spectrogram the mean over its windows."""
    windows = [windows_of(one) for one in spectrograms]
    device = next(model.parameters()).device
    _, embedded = model(torch.cat(windows).to(device))
    means = [part.mean(0) for part in embedded.split([len(one) for one in windows])]
    return F.normalize(torch.stack(means), dim=1)
