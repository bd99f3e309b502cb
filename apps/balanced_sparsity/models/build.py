"""From the configuration and what the data is like to a network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from apps.balanced_sparsity.config import ModelConfig
from apps.balanced_sparsity.models.speaker_encoder import SpeakerEncoder
from apps.balanced_sparsity.models.speech_lstm import SpeechLstm
from apps.balanced_sparsity.models.vgg import Vgg
from apps.balanced_sparsity.models.word_lstm import WordLstm
from apps.program.errors import UserError


@dataclass(frozen=True)
class Shape:
    """What a network must know of its data: inputs (channels, features) and outputs (classes, words)."""

    inputs: int
    outputs: int
    side: int = 0
    """Pixels of an image's side."""


def build_model(config: ModelConfig, shape: Shape) -> nn.Module:
    """The network, its weights drawn from torch's generator (the speaker encoder's are loaded elsewhere).

    Raises:
        UserError: the images are too small for the number of stages.
    """
    if config.name == "vgg":
        vgg = config.vgg
        if shape.side >> len(vgg.stages) < 1:
            raise UserError(
                f"Images of {shape.side} pixels cannot be halved {len(vgg.stages)} times: give fewer model.vgg.stages."
            )
        return Vgg(
            vgg.stages, shape.inputs, shape.outputs,
            hidden=vgg.hidden, pooled=vgg.pooled, dropout=vgg.dropout, batch_norm=vgg.batch_norm,
        )  # fmt: skip
    lstm = config.lstm
    if config.name == "word_lstm":
        return WordLstm(shape.outputs, lstm.hidden, lstm.layers, lstm.dropout, lstm.initial)
    if config.name == "speech_lstm":
        return SpeechLstm(shape.inputs, shape.outputs, lstm.hidden, lstm.layers, lstm.dropout)
    return SpeakerEncoder()
