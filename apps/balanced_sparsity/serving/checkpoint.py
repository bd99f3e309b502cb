"""A pruned language model on disk, packed, as the serving engine loads it (actors/llumnix/engine/weights/balanced.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from actors.llumnix.engine.tokenizer import Tokenizer
from actors.llumnix.engine.weights import balanced
from apps.balanced_sparsity.pruning.packing import fullest_block
from apps.balanced_sparsity.serving.llama import Llama
from kernels.balanced import BalancedWeight, pack
from kernels.balanced.spec import TORCH_DTYPES, ValueType


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of a checkpoint's weights, without the tokenizer."""

    matrix_bytes: int
    """Of the matrices that are balanced."""
    ideal_bytes: float
    """What they would take without any padding: values, and the smallest index."""
    dense_bytes: int
    """What they would take dense in the same value type (int8: with a scale a row)."""
    other_bytes: int
    """Embedding, head, norms, biases, matrices that stayed dense."""
    file_bytes: int


def save_checkpoint(
    folder: Path,
    model: Llama,
    masks: Mapping[str, torch.Tensor],
    block: int,
    *,
    value_type: ValueType = "bf16",
    other_type: torch.dtype = torch.bfloat16,
    vector: int = 1,
    tokenizer: Tokenizer | None = None,
) -> CheckpointSize:
    """Packs the matrices of ``masks`` (by the engine's names, as ``sparsify_`` gives them) and writes the model into ``folder``.

    Args:
        block: columns of a block, as in the pattern; k is what the masks keep in the fullest block.
        value_type: of the balanced values.
        other_type: of everything else; norms and biases stay float32.
        tokenizer: is written, too: without one the folder cannot be served.

    Raises:
        BalancedFormatError: masks that keep different numbers in the blocks of a matrix, or values that the type cannot hold.
    """
    tensors: dict[str, BalancedWeight | torch.Tensor] = {}
    matrix_bytes = dense_bytes = other_bytes = 0
    ideal = 0.0
    state = model.state_dict()
    for parameter, name in model.names().items():
        tensor = state[parameter].detach()
        if name in masks:
            k = fullest_block(masks[name].float(), block, vector)
            packed = pack(tensor, k, block, value_type=value_type, mask=masks[name], vector=vector, layout="rows")
            tensors[name] = packed
            matrix_bytes += packed.nbytes
            ideal += packed.spec.ideal_bytes
            dense_bytes += tensor.numel() * TORCH_DTYPES[value_type].itemsize + 4 * packed.spec.scales_count
        else:
            tensors[name] = tensor if tensor.dim() == 1 else tensor.to(other_type)
            other_bytes += tensors[name].nbytes
    balanced.save(folder, model.config, tensors)
    if tokenizer is not None:
        tokenizer.save(folder)
    return CheckpointSize(
        matrix_bytes, ideal, dense_bytes, other_bytes, (folder / balanced.WEIGHTS_FILE).stat().st_size
    )
