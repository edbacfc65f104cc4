"""From a shard row to a batch: which frames a clip takes, how it is augmented, how batches are loaded."""
