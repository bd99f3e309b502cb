"""ELECTRA (Clark et al. 2020): a generator fills the masks, the discriminator says which tokens were replaced."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from apps.mcmisp.model.config import ModelConfig
from apps.mcmisp.model.encoder import Captured, Encoder, HeadsByLayer
from apps.mcmisp.model.masked import MaskedLM


@dataclass(frozen=True)
class ElectraOutput:
    """generator_logits_MV at masked positions; sampled_M what was put there; replaced_BS where that differs from the original;

    detection_BS logits of "replaced"; ``ids_BS`` the discriminator's input.
    """

    generator_logits_MV: torch.Tensor
    sampled_M: torch.Tensor
    ids_BS: torch.Tensor
    replaced_BS: torch.Tensor
    detection_BS: torch.Tensor
    generator_captures: list[Captured]
    discriminator_captures: list[Captured]


class Electra(nn.Module):
    """Generator and discriminator share the token embeddings (section 3.2 of the paper: "weight sharing")."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        spec = config.spec(vocab_size)
        self.discriminator = Encoder(spec)
        self.generator = MaskedLM(config.generator_spec(vocab_size))
        self.generator.encoder.tokens = self.discriminator.tokens
        self.detect_dense = nn.Linear(spec.width, spec.width, bias=spec.bias)
        self.detect = nn.Linear(spec.width, 1)
        for layer in (self.detect_dense, self.detect):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(
        self,
        masked_BS: torch.Tensor,
        original_BS: torch.Tensor,
        document_BS: torch.Tensor | None,
        chosen_M: torch.Tensor,
        uniform_MV: torch.Tensor | None = None,
        *,
        generator_guided: HeadsByLayer | None = None,
        guided: HeadsByLayer | None = None,
        backend="rows",
        ablated: HeadsByLayer | None = None,
    ) -> ElectraOutput:
        """``uniform_MV`` in (0, 1): draws from which replacements are sampled (Gumbel's argmax), so that they do not depend on

        the number of workers; [M] draws are read as one quantile each, None takes torch's generator.
        """
        logits, generator_captures = self.generator(
            masked_BS, document_BS, chosen_M, guided=generator_guided, backend=backend
        )
        with torch.no_grad():
            sampled = _sample(logits.float(), uniform_MV)
            filled = original_BS.flatten().clone()
            filled[chosen_M] = sampled
            filled = filled.view_as(original_BS)
            replaced = filled != original_BS
        hidden, captures = self.discriminator(filled, document_BS, guided=guided, backend=backend, ablated=ablated)
        detection = self.detect(functional.gelu(self.detect_dense(hidden))).squeeze(-1)
        return ElectraOutput(logits, sampled, filled, replaced, detection, generator_captures, captures)


def _sample(logits_MV: torch.Tensor, uniform: torch.Tensor | None) -> torch.Tensor:
    """One token of each row's softmax, by inverting its cumulative distribution or by Gumbel's argmax."""
    if uniform is None:
        return torch.distributions.Categorical(logits=logits_MV).sample()
    if uniform.ndim == 1:
        cumulative = logits_MV.double().softmax(-1).cumsum(-1)
        return torch.searchsorted(cumulative, uniform.double()[:, None] * cumulative[:, -1:]).squeeze(1)
    return (logits_MV - (-uniform.log()).log()).argmax(-1)


__all__ = ["Electra", "ElectraOutput"]
