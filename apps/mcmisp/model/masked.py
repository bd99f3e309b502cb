"""BERT for masked-word prediction: an encoder and a head with logits at the chosen positions alone (sparse prediction)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from apps.mcmisp.model.config import EncoderSpec
from apps.mcmisp.model.encoder import Encoder


class PredictionHead(nn.Module):
    """dense, GELU, norm, then the transposed token embeddings (tied) and, with biases, one for each token."""

    def __init__(self, spec: EncoderSpec):
        super().__init__()
        self.dense = nn.Linear(spec.width, spec.embedding_width, bias=spec.bias)
        self.norm = nn.LayerNorm(spec.embedding_width, eps=spec.norm_eps, bias=spec.bias)
        self.bias = nn.Parameter(torch.zeros(spec.vocab_size)) if spec.bias else None
        nn.init.normal_(self.dense.weight, std=0.02)
        if self.dense.bias is not None:
            nn.init.zeros_(self.dense.bias)

    def forward(self, hidden_ME: torch.Tensor, embeddings_VE: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.norm(functional.gelu(self.dense(hidden_ME))), embeddings_VE, self.bias)


class MaskedLM(nn.Module):
    """``logits_MV, captures = model(ids_BS, document_BS, chosen_M)``: M flat positions (b * S + s) of the rows."""

    def __init__(self, spec: EncoderSpec):
        super().__init__()
        self.encoder = Encoder(spec)
        self.head = PredictionHead(spec)

    def forward(self, ids_BS: torch.Tensor, document_BS: torch.Tensor | None, chosen_M: torch.Tensor, **capture):
        """``capture``: ``guided``, ``backend`` and ``ablated`` of the encoder."""
        hidden, captures = self.encoder(ids_BS, document_BS, **capture)
        return self.head(hidden.flatten(0, 1)[chosen_M], self.encoder.tokens.weight), captures


__all__ = ["MaskedLM", "PredictionHead"]
