"""Workloads built from their published shapes without downloads: ResNets, ViT, BERTs, MiniLM, LSTM, Llama decoding."""
