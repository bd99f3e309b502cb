"""An LSTM that classifies a sequence of frames (spoken digits, phones, an image row by row) from the mean of its outputs."""

from __future__ import annotations

import torch
from torch import nn


class SpeechLstm(nn.Module):
    """``layers`` LSTM layers over frames, the mean over a sequence's own frames, a linear layer to the classes."""

    def __init__(self, features: int, classes: int, hidden: int, layers: int, dropout: float):
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, frames_BTF: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes]; frames from a sequence's length on do not count."""
        hidden_BTH, _ = self.lstm(frames_BTF)
        within_BT1 = (torch.arange(frames_BTF.shape[1], device=lengths_B.device) < lengths_B[:, None]).unsqueeze(2)
        mean_BH = (hidden_BTH * within_BT1).sum(1) / lengths_B[:, None]
        return self.classifier(self.dropout(mean_BH))
