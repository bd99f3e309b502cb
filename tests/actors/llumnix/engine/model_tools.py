"""Helpers of the model tests: batches over a block table in odd order, and greedy decoding with nothing but ``Model.forward``."""

from __future__ import annotations

import torch

from actors.llumnix.engine.batch import ModelBatch


def make_batch(pieces: list[tuple[list[int], int, list[int]]], all_rows: bool = False) -> ModelBatch:
    """A batch of (token ids, position of the first, block ids) per sequence; logits of the last token each, or of all."""
    token_ids, positions, start, context, rows = [], [], [0], [], []
    width = max(len(blocks) for *_, blocks in pieces)
    table = torch.zeros(len(pieces), width, dtype=torch.int32)
    for s, (ids, first, blocks) in enumerate(pieces):
        token_ids += ids
        positions += range(first, first + len(ids))
        start.append(len(token_ids))
        context.append(first + len(ids))
        rows += range(start[-2], start[-1]) if all_rows else [start[-1] - 1]
        table[s, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    i32 = {"dtype": torch.int32}
    return ModelBatch(
        torch.tensor(token_ids),
        torch.tensor(positions, **i32),
        torch.tensor(start, **i32),
        torch.tensor(context, **i32),
        table,
        torch.tensor(rows),
    )


def blocks_for(num_tokens: int, first: int = 1, step: int = 1) -> list[int]:
    """Block ids for a sequence of that many tokens, beginning at ``first``, ``step`` apart (negative: backwards)."""
    return [first + i * step for i in range(-(-num_tokens // 16))]


def greedy(
    model, kv: torch.Tensor, prompts: list[list[int]], num_tokens: int, ignore_eos: bool = False
) -> list[list[int]]:
    """Greedy continuations, all prompts prefilled in one batch and decoded together."""
    width = max(len(p) for p in prompts) + num_tokens
    per_seq = -(-width // 16)
    assert per_seq * len(prompts) < kv.shape[0]
    tables = [blocks_for(width, 1 + s * per_seq) for s in range(len(prompts))]
    live = list(range(len(prompts)))
    new: list[list[int]] = [list(p) for p in prompts]
    done = [0] * len(prompts)
    out: list[list[int]] = [[] for _ in prompts]
    for _ in range(num_tokens):
        logits = model.forward(make_batch([(new[s], done[s], tables[s]) for s in live]), kv)
        for row, s in enumerate(list(live)):
            token = int(logits[row].argmax())
            done[s] += len(new[s])
            new[s] = [token]
            out[s].append(token)
            if token in model.eos_token_ids and not ignore_eos:
                live.remove(s)
        if not live:
            break
    return out
