"""Readers of model files: GGUF and Hugging Face folders, both giving a ``WeightSource`` and what a tokenizer is made of."""
