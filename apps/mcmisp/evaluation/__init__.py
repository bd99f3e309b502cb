"""What a pre-trained encoder is worth: masked loss, BLiMP, fine-tuning, and whether the mechanism does what it is meant to."""
