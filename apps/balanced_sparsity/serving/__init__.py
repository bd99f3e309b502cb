"""From a pruned model to a served one: a language model for the serving engine, and an LSTM that answers frame by frame."""
