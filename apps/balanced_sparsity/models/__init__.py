"""The networks that are trained, pruned and exported: VGG, word-level LSTM, speech LSTM, the trained speaker encoder."""
