"""Which videos there are, and how their shards are written and read."""
