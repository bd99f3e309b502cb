"""The encoders that McMisP trains: modern and classic BERT behind one configuration, and ELECTRA made of two of them."""

from apps.mcmisp.model.config import EncoderSpec, ModelConfig
from apps.mcmisp.model.electra import Electra
from apps.mcmisp.model.encoder import Captured, Encoder
from apps.mcmisp.model.masked import MaskedLM

__all__ = ["Captured", "Electra", "Encoder", "EncoderSpec", "MaskedLM", "ModelConfig"]
