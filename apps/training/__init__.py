"""What the training apps share: position in the data, checkpoints that resume step-exactly, a worker with or without Ray."""
