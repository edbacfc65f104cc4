"""From a checkpoint to logits: a split's scores, features of every window, a single raw video."""
