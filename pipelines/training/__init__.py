"""From batches to a checkpoint: settings, schedule, initial weights, each worker's loop, the Ray Train run."""
