"""A trained model read back from its ``model.pt``, with the configuration and tokenizer that it was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from apps.mcmisp.config import McmispConfig
from apps.mcmisp.data.tokenizer import TextTokenizer
from apps.mcmisp.training.loop import MODEL_FILE, build_model
from apps.program.errors import UserError
from apps.training.checkpoint import load_tensors


@dataclass
class Trained:
    config: McmispConfig
    model: nn.Module
    tokenizer: TextTokenizer


def load_trained(path: str | Path, device: str | torch.device = "cpu") -> Trained:
    """``path``: a ``model.pt``, or a folder of a run that holds one.

    Raises:
        UserError: there is none, or it is of another program.
    """
    file = Path(path).expanduser()
    file = file / MODEL_FILE if file.is_dir() else file
    content = load_tensors(file, device)
    if not isinstance(content, dict) or not {"config", "tokenizer", "weights"} <= content.keys():
        raise UserError(f"{file} is no model of this program: it lacks a configuration, a tokenizer or weights.")
    try:
        config = McmispConfig.model_validate_json(content["config"])
    except ValueError as error:
        raise UserError(
            f"{file} was written by another version of this program: {str(error).splitlines()[0]}."
        ) from error
    tokenizer = TextTokenizer(content["tokenizer"])
    model = build_model(config, tokenizer.size).to(device)
    model.load_state_dict(content["weights"])
    return Trained(config, model.eval(), tokenizer)


__all__ = ["Trained", "load_trained"]
