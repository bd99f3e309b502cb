"""The word-level LSTM language model of Zaremba, Sutskever & Vinyals, "Recurrent Neural Network Regularization" (2014)."""

from __future__ import annotations

import torch
from torch import nn

State = tuple[torch.Tensor, torch.Tensor]


class WordLstm(nn.Module):
    """Embedding, LSTM layers, linear to the vocabulary.

    Dropout where the paper has it: on the embedding, between the layers, on the last layer's output; never on the recurrent
    connections. All weights are drawn uniformly from [-``initial``, ``initial``].

    Args:
        words: of the vocabulary.
        hidden: units of a layer, and width of the embedding.
    """

    def __init__(self, words: int, hidden: int, layers: int, dropout: float, initial: float):
        super().__init__()
        self.embedding = nn.Embedding(words, hidden)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(hidden, hidden, layers, dropout=dropout if layers > 1 else 0.0)
        self.decoder = nn.Linear(hidden, words)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -initial, initial)

    def forward(self, words_TB: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """Logits [time, batch, words] of the next word, and the state after it."""
        hidden_TBH, state = self.lstm(self.dropout(self.embedding(words_TB)), state)
        return self.decoder(self.dropout(hidden_TBH)), state

    def first_state(self, batch: int) -> State:
        """Zeros [layers, batch, hidden], twice."""
        like = self.embedding.weight
        zeros = like.new_zeros(self.lstm.num_layers, batch, self.lstm.hidden_size)
        return zeros, zeros.clone()
