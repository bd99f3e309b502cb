"""Text to packed rows: sources, normalisation, tokenizer, packing with document masks, shards, and the exact order of rows."""
