"""From a checkpoint to logits: a split's scores, features of every window, a raw video, Fréchet distances."""
