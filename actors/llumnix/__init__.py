"""Llumnix (OSDI 2024): LLM serving on instances between which requests migrate live."""
