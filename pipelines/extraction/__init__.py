"""From a catalog to shards: the plan, the Ray Data graph that carries it out, and the manifest that ends it."""
