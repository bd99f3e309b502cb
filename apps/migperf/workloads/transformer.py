"""Transformers of the catalogue: encoders as BERT's (learned positions, post-norm, GELU), the ViT (pre-norm, patches, a class
token), and a Llama-shaped decoder (RMSNorm, rotary positions, grouped KV heads, SwiGLU) that decodes against a KV cache.

Shapes: B batch, L tokens, D hidden, N heads, K KV heads, H head dimension, V vocabulary, C context in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apps.migperf.workloads.shapes import Shape


class Layer(nn.Module):
    """Attention and feed-forward of an encoder, the norm after (BERT) or before (ViT)."""

    def __init__(self, shape: Shape, pre_norm: bool):
        super().__init__()
        self.heads, self.pre_norm = shape.heads, pre_norm
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        self.up = nn.Linear(shape.width, shape.feed_forward)
        self.down = nn.Linear(shape.feed_forward, shape.width)
        self.norms = nn.ModuleList([nn.LayerNorm(shape.width, eps=1e-12) for _ in range(2)])

    def forward(self, x_BLD: Tensor) -> Tensor:
        if self.pre_norm:
            x_BLD = x_BLD + self._attend(self.norms[0](x_BLD))
            return x_BLD + self.down(F.gelu(self.up(self.norms[1](x_BLD))))
        x_BLD = self.norms[0](x_BLD + self._attend(x_BLD))
        return self.norms[1](x_BLD + self.down(F.gelu(self.up(x_BLD))))

    def _attend(self, x_BLD: Tensor) -> Tensor:
        batch, length, width = x_BLD.shape
        q, k, v = self.qkv(x_BLD).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))


class Encoder(nn.Module):
    """Token ids [B, L] to logits [B, classes] of the first token."""

    def __init__(self, shape: Shape, longest: int):
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(longest, shape.width)
        self.norm = nn.LayerNorm(shape.width, eps=1e-12)
        self.layers = nn.Sequential(*(Layer(shape, pre_norm=False) for _ in range(shape.depth[0])))
        self.pooler = nn.Linear(shape.width, shape.width)
        self.head = nn.Linear(shape.width, shape.classes)

    def forward(self, ids_BL: Tensor) -> Tensor:
        places = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        x_BLD = self.layers(self.norm(self.tokens(ids_BL) + self.positions(places)))
        return self.head(torch.tanh(self.pooler(x_BLD[:, 0])))


class VisionTransformer(nn.Module):
    """Pictures [B, 3, H, H] to logits [B, classes]."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.patches = nn.Conv2d(3, shape.width, shape.patch, shape.patch)
        count = (shape.picture // shape.patch) ** 2
        self.class_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.positions = nn.Parameter(torch.randn(1, count + 1, shape.width) * 0.02)
        self.layers = nn.Sequential(*(Layer(shape, pre_norm=True) for _ in range(shape.depth[0])))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BLD = self.patches(x_BCHW).flatten(2).transpose(1, 2)
        x_BLD = torch.cat([self.class_token.expand(len(x_BLD), -1, -1), x_BLD], 1) + self.positions
        return self.head(self.norm(self.layers(x_BLD)[:, 0]))


class DecoderLayer(nn.Module):
    """Llama's layer; with a cache its queries are the newest tokens."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.kv_heads, self.head = shape.heads, shape.kv_heads, shape.width // shape.heads
        self.q = nn.Linear(shape.width, shape.width, bias=False)
        self.kv = nn.Linear(shape.width, 2 * self.kv_heads * self.head, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.gate_up = nn.Linear(shape.width, 2 * shape.feed_forward, bias=False)
        self.down = nn.Linear(shape.feed_forward, shape.width, bias=False)
        self.norms = nn.ModuleList([nn.RMSNorm(shape.width, eps=1e-5) for _ in range(2)])

    def forward(self, x_BLD: Tensor, rotation: Tensor, cache: Tensor | None) -> Tensor:
        x_BLD = x_BLD + self._attend(self.norms[0](x_BLD), rotation, cache)
        gate, up = self.gate_up(self.norms[1](x_BLD)).chunk(2, -1)
        return x_BLD + self.down(F.silu(gate) * up)

    def _attend(self, x_BLD: Tensor, rotation: Tensor, cache: Tensor | None) -> Tensor:
        """``cache`` [2, B, K, C, H]: keys (rotated) and values of the context, into whose last place the new ones are put."""
        batch, length, _ = x_BLD.shape
        q_BNLH = rotate(self.q(x_BLD).view(batch, length, self.heads, self.head).transpose(1, 2), rotation)
        k, v = self.kv(x_BLD).view(batch, length, 2, self.kv_heads, self.head).permute(2, 0, 3, 1, 4)
        k = rotate(k, rotation)
        if cache is not None:
            cache[0, :, :, -length:], cache[1, :, :, -length:] = k, v
            k, v = cache
        out = F.scaled_dot_product_attention(q_BNLH, k, v, is_causal=cache is None, enable_gqa=True)
        return self.out(out.transpose(1, 2).reshape(batch, length, -1))


class Decoder(nn.Module):
    """Token ids [B, L] to logits [B, L, V]; ``decode`` is one step of generation against a full context."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList([DecoderLayer(shape) for _ in range(shape.depth[0])])
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, ids_BL: Tensor, cache: Tensor | None = None, first: int = 0) -> Tensor:
        x_BLD = self.tokens(ids_BL)
        rotation = rotations(first, ids_BL.shape[1], self.shape.width // self.shape.heads, x_BLD.device)
        for number, layer in enumerate(self.layers):
            x_BLD = layer(x_BLD, rotation, None if cache is None else cache[number])
        return F.linear(self.norm(x_BLD), self.tokens.weight)  # tied, as in the small Llamas

    def new_cache(self, batch: int, context: int, like: Tensor) -> Tensor:
        """[layers, 2, B, K, C, H] of random keys and values: a context of ``context`` tokens, the newest one's place last."""
        one = self.layers[0]
        return torch.randn(
            len(self.layers), 2, batch, one.kv_heads, context, one.head, dtype=like.dtype, device=like.device
        )

    def decode(self, ids_B1: Tensor, cache: Tensor) -> Tensor:
        """Logits [B, V] of the next token, the newest one being the last of the context."""
        return self(ids_B1, cache, cache.shape[-2] - 1)[:, -1]


def rotations(first: int, count: int, head: int, device: torch.device) -> Tensor:
    """[count, H/2] angles of the positions ``first`` on (RoFormer, base 10,000)."""
    frequency = 10_000 ** (-torch.arange(0, head, 2, device=device, dtype=torch.float32) / head)
    return torch.outer(torch.arange(first, first + count, device=device, dtype=torch.float32), frequency)


def rotate(x_BNLH: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions on the two halves of the head dimension (Llama's layout)."""
    a, b = x_BNLH.chunk(2, -1)
    cos, sin = angles.cos().to(x_BNLH.dtype), angles.sin().to(x_BNLH.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class LstmModel(nn.Module):
    """A language model over an LSTM: ids [B, L] to logits [B, L, V]."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.lstm = nn.LSTM(shape.width, shape.width, shape.depth[0], batch_first=True)
        self.head = nn.Linear(shape.width, shape.vocabulary)

    def forward(self, ids_BL: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(ids_BL))[0])
