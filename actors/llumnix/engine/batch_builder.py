"""Turns the scheduler's plan into the model's input arrays. Runs at every step, so it writes into arrays made once."""

from __future__ import annotations

import numpy as np
import torch

from actors.llumnix.engine.batch import ModelBatch
from actors.llumnix.engine.scheduler import Plan


class BatchBuilder:
    """Owns the arrays; a built batch is valid until the next ``build``."""

    def __init__(self, max_tokens: int, max_sequences: int, max_blocks: int):
        self._token_ids = np.zeros(max_tokens, dtype=np.int64)
        self._positions = np.zeros(max_tokens, dtype=np.int32)
        self._query_start = np.zeros(max_sequences + 1, dtype=np.int32)
        self._context_len = np.zeros(max_sequences, dtype=np.int32)
        self._logits_rows = np.zeros(max_sequences, dtype=np.int64)
        self._tables = np.zeros(max_sequences * max_blocks, dtype=np.int32)

    def build(self, plan: Plan) -> ModelBatch:
        """The batch of ``plan``, sequences in its order; logits are wanted where all of a sequence's tokens are in."""
        num_seqs = len(plan.sequences)
        token_ids, positions = self._token_ids, self._positions
        query_start, context_len, logits_rows = self._query_start, self._context_len, self._logits_rows
        width = max(len(seq.block_table) for seq in plan.sequences)
        # The first S*N elements as a contiguous matrix, because kernels want contiguous tables.
        tables = self._tables[: num_seqs * width].reshape(num_seqs, width)
        t = rows = 0
        for s, (seq, num) in enumerate(zip(plan.sequences, plan.counts, strict=True)):
            first = seq.num_computed
            end = first + num
            if num == 1:
                token_ids[t] = seq.tokens[first]
                positions[t] = first
            else:
                token_ids[t : t + num] = seq.tokens[first:end]
                positions[t : t + num] = np.arange(first, end, dtype=np.int32)
            t += num
            query_start[s + 1] = t
            context_len[s] = end
            if end == len(seq.tokens):
                logits_rows[rows] = t - 1
                rows += 1
            # Rows longer than the table are zero: a table row of a sequence never shrinks but to nothing.
            tables[s] = seq.table_row[:width]
        return ModelBatch(
            token_ids_T=torch.from_numpy(token_ids[:t]),
            positions_T=torch.from_numpy(positions[:t]),
            query_start=torch.from_numpy(query_start[: num_seqs + 1]),
            context_len_S=torch.from_numpy(context_len[:num_seqs]),
            block_table_SN=torch.from_numpy(tables),
            logits_rows_R=torch.from_numpy(logits_rows[:rows]),
        )
